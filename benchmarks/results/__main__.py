"""`make results MODALITY=speaker`: real data, one pretraining, three encoders under one protocol; into docs/results.md.

Each modality has a file here with `measure(folder) -> text`: it downloads public data, packs it, trains a configuration of
configs/results and scores the trained teacher beside the same network untrained and hand-made features. Its section of
docs/results.md is replaced, the others stay. The folder keeps downloads, shards and runs; a run that is there goes on.
"""

import argparse
import importlib
import logging
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.results.page import replace_section
from benchmarks.results.running import ROOT, Failed, commit

logger = logging.getLogger("results")
MODALITIES = ("speaker", "spectrogram")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.results",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("modality", choices=MODALITIES)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "results", help="of everything that it makes")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md", help="where the section is written")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    began = time.monotonic()
    try:
        text = importlib.import_module(f"benchmarks.results.{arguments.modality}").measure(arguments.folder.resolve())
    except Failed as error:
        sys.stderr.write(f"results: {error}\n")
        return 2
    minutes = (time.monotonic() - began) / 60
    text += (
        f"\n`make results MODALITY={arguments.modality}`, {datetime.now(UTC):%Y-%m-%d}, commit {commit()}, "
        f"{platform.machine()}, {minutes:.0f} minutes this time (runs and downloads that were there were used).\n"
    )
    replace_section(arguments.page, arguments.modality, text)
    logger.info("\nwritten: %s", arguments.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
