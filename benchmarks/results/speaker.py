"""Voices: are two utterances of one speaker, and who is the nearest one? Twenty speakers of twenty languages."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.results import page
from benchmarks.results.encoders import HAND_MADE, RANDOM, TRAINED, hand_made, network_features
from benchmarks.results.running import Failed, debian_package, pack, run
from eval_protocols import knn, report, verification
from eval_protocols.features import FeatureSet
from eval_protocols.trials import draw_trials
from ssl_platform.data.index import Index
from ssl_platform.modalities._fbank import Fbank

VOICES = "klettres-data"
OTHER_SPEECH = ("tuxpaint-stamps-default", "fillets-ng-data-cs", "fillets-ng-data-nl")
CONFIG = "configs/results/speaker.yaml"
OTHERS_ONLY = "trained without these voices"
WITHOUT_MEAN = "log-mel std alone"
FBANK = Fbank(num_bins=80, window="hamming", scale=32768.0)
TRIALS_PER_SPEAKER = 500


def measure(folder: Path) -> str:
    """The section of docs/results.md."""
    packages = {name: debian_package(name, folder / "download") for name in (VOICES, *OTHER_SPEECH)}
    shards = folder / "speaker"
    voices = pack(voices_of(packages[VOICES].files), shards / "voices.csv", shards / "voices")
    unlabelled = [{"path": path} for name in OTHER_SPEECH for path in speech_of(packages[name].files)]
    others = pack(unlabelled, shards / "others.csv", shards / "others")
    for run_dir, data in ((shards / "run", [voices, others]), (shards / "run_others", [others])):
        listed = ", ".join(f'"{each}"' for each in data)
        run("ssl-train", CONFIG, f"run_dir={run_dir}", f"data.shards=[{listed}]")
    index = Index.open(voices)
    by_hand = hand_made(index, FBANK)
    features = {
        TRAINED: network_features(shards / "run", index),
        RANDOM: network_features(shards / "run", index, random_init=True),
        HAND_MADE: by_hand,
        WITHOUT_MEAN: by_hand[:, FBANK.num_bins :],
        OTHERS_ONLY: network_features(shards / "run_others", index),
    }
    found = scores(features, index)
    report.write_result(shards / "results.json", found)
    return section([package.line for package in packages.values()], index, len(Index.open(others)), found)


def voices_of(files: Path) -> Iterator[dict[str, str]]:
    """The letters and syllables of each language, which one voice speaks: label and group are the language's folder."""
    root = files / "usr/share/klettres"
    if not root.is_dir():
        raise Failed(f"{root}: not in the package {VOICES}, whose layout has changed")
    for file in sorted(root.glob("*/*/*.ogg")):
        language = file.relative_to(root).parts[0]
        yield {"path": str(file), "label": language, "group": language}


def speech_of(files: Path) -> Iterator[str]:
    """Names of stamps in many languages, and what the fishes (-m-, -v-) of Fish Fillets say; neither music nor noises."""
    for file in sorted(files.rglob("*.ogg")):
        if re.search(r"_desc(_\w+)?\.ogg$|-[mv]-", file.name):
            yield str(file)


# -- scores ------------------------------------------------------------------------------------------------------------


def scores(features: dict[str, NDArray[np.float32]], index: Index) -> dict[str, Any]:
    """Verification and the nearest neighbour of {name: (N, D)}, both by cosines after the mean of all is subtracted."""
    trials = draw_trials(index.labels, TRIALS_PER_SPEAKER)
    verified = verification.score(features, trials, index.labels)
    del verified["scores"]
    names, ids = tuple(index.label_names), np.arange(len(index))
    sets = {
        name: FeatureSet(each - each.mean(0), index.labels, index.groups, ids, names) for name, each in features.items()
    }
    neighbours = knn.score({name: (one, one) for name, one in sets.items()}, ks=[1], headline_k=1)
    return {
        "trials": {"targets": int(trials.is_target.sum()), "others": int((~trials.is_target).sum())},
        "verification": verified,
        "neighbour": {
            part: {name: by_k[1] for name, by_k in neighbours[part].items()} for part in ("results", "differences")
        },
    }


def section(sources: list[str], index: Index, num_unlabelled: int, found: dict[str, Any]) -> str:
    verified, neighbour, trials = found["verification"], found["neighbour"], found["trials"]
    rows = []
    for name, figures in verified["results"].items():
        near = neighbour["results"][name]
        cells = [figures["eer"], figures["eer_interpolated"], near["top1"], near["balanced_accuracy"]]
        rows.append([name, *map(page.percent, cells), report.interval_text(figures["min_dcf_0.05"])])
    lines = [
        "## Speaker: twenty voices",
        "",
        f"{len(index)} letters and syllables by {len(index.label_names)} voices. A voice is a language, a microphone and a "
        f"room at once, so these figures are of all of them together. Pretraining ({CONFIG}) saw these utterances and "
        f"{num_unlabelled} more, none with a label; a second run saw those others alone. Scores are cosines after the mean "
        f"of all utterances is subtracted; {trials['targets']} target trials and {trials['others']} others (at most "
        f"{TRIALS_PER_SPEAKER} of a voice and kind); the nearest neighbour is among all other utterances. Intervals "
        "resample voices. The mean of each band is the colour of microphone and room as much as that of the voice: "
        f"networks have it taken away, and so has '{WITHOUT_MEAN}'. Packages: " + "; ".join(sources) + ".",
        "",
        page.table(
            [
                "encoder",
                "EER % (convex hull)",
                "EER % (interpolated)",
                "1-NN %",
                "1-NN, mean of voices %",
                "minDCF .05",
            ],
            rows,
        ),
        *(
            page.sentence(TRAINED, name, "EER", differences["eer"], lower_is_better=True)
            for name, differences in verified["differences"].items()
        ),
        *(
            page.sentence(TRAINED, name, "1-NN", differences["top1"])
            for name, differences in neighbour["differences"].items()
        ),
    ]
    return "\n".join(lines) + "\n"
