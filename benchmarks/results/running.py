"""Commands of this project, and public data from Debian's packages, without root and without installing them."""

import csv
import hashlib
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {
    "ssl-pack": "ssl_platform.data.pack",
    "ssl-train": "ssl_platform.train",
    "ssl-eval": "eval_protocols.__main__",
}

logger = logging.getLogger("results")


class Failed(Exception):
    """What the user can put right, in words."""


class Package(NamedTuple):
    """A Debian package that is here."""

    name: str
    version: str
    sha256: str
    files: Path
    """Its files, as they would lie below /."""

    @property
    def line(self) -> str:
        return f"{self.name} {self.version} (sha256 {self.sha256[:16]}...)"


def run(command: str, *arguments: object) -> None:
    """Shows a command of this project and runs it with this interpreter; raises Failed if it fails."""
    words = [str(argument) for argument in arguments]
    logger.info("\n$ %s %s", command, " ".join(words))
    try:
        subprocess.run([sys.executable, "-m", SCRIPTS[command], *words], check=True, cwd=ROOT)
    except subprocess.CalledProcessError as error:
        raise Failed(f"{command} ended with {error.returncode}; its messages are above") from error


def commit() -> str:
    """The commit of this checkout, or 'unknown' outside of one."""
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def debian_package(name: str, downloads: Path) -> Package:
    """Downloads a package, whose checksum apt holds against Debian's signed lists, and unpacks it below `downloads`.

    Raises Failed that says what is missing.
    """
    for tool in ("apt-get", "dpkg", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise Failed(
                f"{tool}: not found; the data comes from Debian's package {name}: run this on Debian or Ubuntu"
            )
    downloads.mkdir(parents=True, exist_ok=True)
    if not (archives := sorted(downloads.glob(f"{name}_*.deb"))):
        logger.info("\n$ apt-get download %s", name)
        found = subprocess.run(["apt-get", "download", name], cwd=downloads, capture_output=True, text=True)
        archives = sorted(downloads.glob(f"{name}_*.deb"))
        if found.returncode or not archives:
            reason = (found.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise Failed(
                f"apt-get download {name}: {reason}\nThe package must be in apt's lists (Debian's section main, Ubuntu's "
                f"universe): run `apt-get update` as root once. Or put {name}_VERSION_all.deb into {downloads} yourself."
            )
    archive, folder = archives[-1], downloads / name
    version = subprocess.run(["dpkg-deb", "-f", archive, "Version"], check=True, capture_output=True, text=True)
    if not (folder / ".unpacked").exists():
        shutil.rmtree(folder, ignore_errors=True)
        try:
            subprocess.run(["dpkg", "-x", archive, folder], check=True)
        except subprocess.CalledProcessError as error:
            raise Failed(f"{archive}: cannot be unpacked, it may be cut off; delete it and run this again") from error
        (folder / ".unpacked").touch()
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    package = Package(name, version.stdout.strip(), digest, folder)
    logger.info("%s", package.line)
    return package


def pack(rows: Iterable[Mapping[str, Any]], table: Path, out: Path) -> Path:
    """Shards of the files that rows (path, and maybe label and group) name; returns `out`."""
    listed = sorted(rows, key=lambda row: str(row["path"]))
    if not listed:
        raise Failed(f"{table}: no file was found for it; the packages may have changed their folders")
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(listed[0]))
        writer.writeheader()
        for row in listed:
            writer.writerow(row)
    # Public data may keep its names; and a salt would shuffle anew on every machine.
    run("ssl-pack", table, out, "--medium", "audio", "--plain-names", "--workers", "2", "--allow-bad")
    return out
