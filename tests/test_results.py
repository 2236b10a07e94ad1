"""`make results` without its downloads: labels, splits, the page, and what it says where something is missing."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.results import page, spectrogram
from benchmarks.results.running import Failed, debian_package
from benchmarks.results.speaker import speech_of, voices_of
from eval_protocols.metrics import Difference
from eval_protocols.metrics import Interval as Figure

ROOT = Path(__file__).parents[1]


def test_a_section_is_replaced_alone(tmp_path: Path) -> None:
    file = tmp_path / "docs/results.md"
    page.replace_section(file, "speaker", "first")
    page.replace_section(file, "spectrogram", "second")
    written = file.read_text()
    assert written.startswith(page.HEAD) and written.index("first") < written.index("second")
    page.replace_section(file, "speaker", r"third \1 <!-- a comment -->")
    assert file.read_text() == written.replace("first", r"third \1 <!-- a comment -->")
    page.replace_section(file, "speaker", "first")
    assert file.read_text() == written


def test_sentences_say_which_way() -> None:
    figure = Figure(0.712, 0.653, 0.768)
    assert page.percent(figure) == "71.2 [65.3, 76.8]"
    for difference, lower, expected in (
        (Difference(0.1, 0.02, 0.2), False, "a is better than b beyond the interval: +10.0 points [+2.0, +20.0]"),
        (Difference(0.1, 0.02, 0.2), True, "a is WORSE than b beyond the interval"),
        (Difference(-0.1, -0.2, -0.05), True, "a is better than b beyond the interval"),
        (Difference(-0.1, -0.2, -0.05), False, "a is WORSE than b beyond the interval"),
        (Difference(0.1, -0.02, 0.2), False, "a does not differ from b beyond the interval"),
    ):
        assert expected in page.sentence("a", "b", "EER", difference, lower)


@pytest.mark.parametrize(
    ("name", "instrument"),
    [
        ("Open HH", "hihat"),
        ("VariBreaks Hat 1 Pd", "hihat"),
        ("g#3 - hi-hat pedal", "hihat"),
        ("tomhi4", "tom"),
        ("EE_Kick_Stomp", "kick"),
        ('Ride (Custom, Zagrebin 22")', "ride"),
        ("Crash/Ride Bow", "several"),
        ("Dununba1 Bell Mute", "several"),
        ("Snare Rimshot", "snare"),
        ("Hand Clap", "clap"),
        ("BassDrum", "kick"),
        ("Cowbell", "cowbell"),
        ("Stick", ""),
        ("Zap 2", ""),
    ],
)
def test_instrument_of_a_name(name: str, instrument: str) -> None:
    assert spectrogram.instrument_of(name) == instrument


def test_sounds_of_kits(tmp_path: Path) -> None:
    (kit := tmp_path / "A kit").mkdir()
    layer = "<layer><filename>{}</filename></layer>"
    named = {"Snare": ["s1.wav"], "Crash/Ride": ["both.flac"], "31": ["Kick-1.wav"]}
    text = "".join(
        f"<instrument><name>{n}</name>{''.join(map(layer.format, f))}</instrument>" for n, f in named.items()
    )
    (kit / "drumkit.xml").write_text(
        f'<drumkit_info xmlns="http://www.hydrogen-music.org/drumkit">{text}</drumkit_info>'
    )
    for name in ("s1.wav", "both.flac", "Kick-1.wav", "noise.aiff", "README"):
        (kit / name).touch()
    rows = {Path(row["path"]).name: (row["label"], row["group"]) for row in spectrogram.sounds(tmp_path)}
    assert rows == {
        "s1.wav": ("snare", "A kit"),
        "both.flac": ("", "A kit"),
        "Kick-1.wav": ("kick", "A kit"),
        "noise.aiff": ("", "A kit"),
    }
    with pytest.raises(Failed, match="whose layout has changed"):
        list(spectrogram.sounds(tmp_path / "none"))


def test_no_kit_helps_to_predict_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the fit nor the choice of the penalty sees the kit that is predicted."""
    rng = np.random.default_rng(0)
    kits, labels = np.repeat(np.arange(6), 10), np.tile(np.arange(2), 30)
    features = (rng.normal(size=(60, 4)) + 1.5 * labels[:, None]).astype(np.float32)
    features[:, 3] = np.arange(60)  # tells which row it was
    seen: list[tuple[set[int], set[int]]] = []
    original = spectrogram.fitted

    def watched(train: np.ndarray, known: np.ndarray, test: np.ndarray, strengths: object) -> np.ndarray:
        fitted_on, predicted = ({int(kits[int(row)]) for row in part[:, 3]} for part in (train, test))
        seen.append((fitted_on, predicted))
        return original(train, known, test, strengths)

    monkeypatch.setattr(spectrogram, "fitted", watched)
    predicted = spectrogram.leave_one_kit_out(features, labels, kits)
    assert (predicted == labels).mean() > 0.8
    assert len(seen) == 6 * 5
    for place in range(0, 30, 5):
        (held,) = seen[place + 4][1]
        for fitted_on, tested in seen[place : place + 5]:
            assert not fitted_on & tested and held not in fitted_on
        assert all(held not in tested for _, tested in seen[place : place + 4])


def test_files_of_voices_and_other_speech(tmp_path: Path) -> None:
    for name in (
        "usr/share/klettres/cs/alpha/A.ogg",
        "usr/share/klettres/en/syllab/dog.ogg",
        "usr/share/klettres/x.ogg",
    ):
        (file := tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert [(row["label"], row["group"]) for row in voices_of(tmp_path)] == [("cs", "cs"), ("en", "en")]
    spoken = {"cat_desc.ogg", "cat_desc_fr.ogg", "vit-m-hlava.ogg", "vit-v-proc.ogg"}
    for name in (*spoken, "cat.ogg", "vit-hs-klid1.ogg", "music.ogg"):
        (tmp_path / name).touch()
    assert {Path(path).name for path in speech_of(tmp_path)} == spoken


def test_without_apt_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Failed, match="apt-get: not found; the data comes from Debian's package klettres-data"):
        debian_package("klettres-data", tmp_path)


def test_a_package_that_apt_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tool in ("apt-get", "dpkg", "dpkg-deb"):
        (script := tmp_path / tool).write_text("#!/bin/sh\necho 'E: Unable to locate package x' >&2\nexit 100\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    with pytest.raises(Failed, match="(?s)apt-get download x: E: Unable to locate package x.*run `apt-get update`"):
        debian_package("x", tmp_path / "downloads")


def test_the_command_lists_its_modalities() -> None:
    asked = subprocess.run(
        [sys.executable, "-m", "benchmarks.results", "points"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert asked.returncode == 2 and "'speaker'" in asked.stderr and "'spectrogram'" in asked.stderr
