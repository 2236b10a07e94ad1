"""Drum sounds: which of ten instruments, from a kit whose sounds no classifier has seen."""

import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.preprocessing import StandardScaler

from benchmarks.results import page
from benchmarks.results.encoders import HAND_MADE, RANDOM, TRAINED, hand_made, network_features
from benchmarks.results.running import ROOT, Failed, debian_package, pack, run
from eval_protocols import metrics, report
from ssl_platform.data.index import Index
from ssl_platform.modalities._fbank import Fbank

PACKAGE = "hydrogen-drumkits"
CONFIG = "configs/results/spectrogram.yaml"
INSTRUMENTS = {
    "tambourine": r"tambourine",
    "clap": r"clap",
    "cowbell": r"cow ?bell|\bbell (hit|mute)",
    "hihat": r"hi ?-?hat|\bhats?\b|hh\b|\bhh",
    "crash": r"crash",
    "ride": r"ride",
    "tom": r"(?<!s)tom",
    "snare": r"snare|rimshot",
    "kick": r"kick|bass ?drum",
    "hand drum": r"conga|bongo|djembe|dunun|sangban|kenkeni|cajon",
}
"""What the name of an instrument in drumkit.xml, else of a file, says; neither "custom" nor "stomp" is a tom."""
STRENGTHS = np.logspace(-3, 1, 5)
"""Inverse strengths of the L2 penalty, one of which is chosen among the training kits."""


def measure(folder: Path) -> str:
    """The section of docs/results.md."""
    package = debian_package(PACKAGE, folder / "download")
    rows = list(sounds(package.files / "usr/share/hydrogen/data/drumkits"))
    labelled = [row for row in rows if row["label"]]
    shards = folder / "spectrogram"
    pretrain = pack([{"path": row["path"], "group": row["group"]} for row in rows], shards / "all.csv", shards / "all")
    scored = pack(labelled, shards / "labelled.csv", shards / "labelled")
    trained = shards / "run"
    run("ssl-train", CONFIG, f"run_dir={trained}", f"data.shards={pretrain}")
    index = Index.open(scored)
    features = {
        TRAINED: network_features(trained, index),
        RANDOM: network_features(trained, index, random_init=True),
        HAND_MADE: hand_made(index, Fbank()),
    }
    predictions = {name: leave_one_kit_out(each, index.labels, index.groups) for name, each in features.items()}
    figures, differences = scores(predictions, index)
    report.write_result(shards / "results.json", {"results": figures, "differences": differences})
    return section(package.line, index, figures, differences)


def sounds(kits: Path) -> Iterator[dict[str, str]]:
    """Every sound of every kit: its path, its instrument ("" where its name says none, or two) and its kit."""
    if not kits.is_dir():
        raise Failed(f"{kits}: not in the package {PACKAGE}, whose layout has changed")
    for kit in sorted(kits.iterdir()):
        tree = ElementTree.parse(kit / "drumkit.xml")
        names: dict[str, list[str]] = defaultdict(list)
        for instrument in tree.iter():
            if instrument.tag.rpartition("}")[2] == "instrument":
                children = {child.tag.rpartition("}")[2]: child.text or "" for child in instrument.iter()}
                for child in instrument.iter():
                    if child.tag.rpartition("}")[2] == "filename":
                        names[child.text or ""].append(children.get("name", ""))
        for file in sorted(kit.iterdir()):
            if file.suffix in (".wav", ".flac", ".aiff"):
                label = next(filter(None, map(instrument_of, [*names[file.name], file.stem])), "")
                yield {"path": str(file), "label": "" if label == "several" else label, "group": kit.name}


def instrument_of(name: str) -> str:
    """The instrument that a name says, "" if none, "several" if it says more than one ("Crash/Ride")."""
    text = name.lower().replace("_", " ")
    found = [instrument for instrument, pattern in INSTRUMENTS.items() if re.search(pattern, text)]
    return found[0] if len(found) == 1 else "several" if found else ""


# -- scores ------------------------------------------------------------------------------------------------------------


def leave_one_kit_out(features: NDArray[np.float32], labels: metrics.Integers, kits: metrics.Integers) -> Any:
    """(N,) predictions: of each kit by a logistic regression fitted on the others, the penalty chosen among those alone."""
    predicted = np.full(len(labels), -1)
    for kit in np.unique(kits):
        test = kits == kit
        strength = best_strength(features[~test], labels[~test], kits[~test])
        predicted[test] = fitted(features[~test], labels[~test], features[test], [strength])[0]
    return predicted


def best_strength(features: NDArray[np.float32], labels: metrics.Integers, kits: metrics.Integers) -> float:
    """By balanced accuracy over four folds of whole kits, of about equal size."""
    sizes, loads, fold = Counter(kits.tolist()), [0] * 4, {}
    for kit, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        fold[kit] = int(np.argmin(loads))
        loads[fold[kit]] += size
    folds = np.array([fold[kit] for kit in kits.tolist()])
    predicted = np.empty((len(STRENGTHS), len(labels)), np.int64)
    for number in range(4):
        held = folds == number
        predicted[:, held] = fitted(features[~held], labels[~held], features[held], STRENGTHS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return float(STRENGTHS[int(np.argmax([balanced_accuracy_score(labels, each) for each in predicted]))])


def fitted(train: NDArray[np.float32], labels: metrics.Integers, test: NDArray[np.float32], strengths: Any) -> Any:
    """(strengths, M) predictions by standardised features; each fit goes on from the one before."""
    scaler = StandardScaler().fit(train)
    model = LogisticRegression(max_iter=500, warm_start=True, class_weight="balanced")
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for strength in strengths:
            model.set_params(C=strength).fit(scaler.transform(train), labels)
            found.append(model.predict(scaler.transform(test)))
    return np.array(found)


def scores(predictions: dict[str, Any], index: Index) -> tuple[dict[str, Any], dict[str, Any]]:
    """Accuracies with intervals over kits, and of the trained network minus each other on the same resamples."""
    num_classes = len(index.label_names)
    figures = {
        name: metrics.bootstrap(index.labels, each, num_classes, index.groups) for name, each in predictions.items()
    }
    differences = {
        name: metrics.paired_bootstrap(index.labels, predictions[TRAINED], each, num_classes, index.groups)
        for name, each in predictions.items()
        if name != TRAINED
    }
    return figures, differences


def section(source: str, index: Index, figures: dict[str, Any], differences: dict[str, Any]) -> str:
    counts = Counter(index.label_names[label] for label in index.labels)
    kits = len(np.unique(index.groups))
    lines = [
        "## Spectrogram: drum sounds, one kit left out",
        "",
        f"{len(index)} sounds of {kits} drum kits ({source}): "
        + ", ".join(f"{name} {count}" for name, count in counts.most_common())
        + ". Labels are what drumkit.xml or the file's name says; names that say two (crash/ride) are left out. "
        f"Pretraining ({(ROOT / CONFIG).relative_to(ROOT)}) saw all sounds of the package without labels, the kits that are "
        "scored included. Logistic regression on frozen features, standardised; each kit is predicted from the others, "
        "and the penalty is chosen among those. Intervals resample kits, which are few: they are rough.",
        "",
        page.table(
            ["encoder", "accuracy %", "balanced accuracy %"], page.three(figures, ("top1", "balanced_accuracy"))
        ),
        *(
            page.sentence(TRAINED, name, what, found[metric])
            for name, found in differences.items()
            for metric, what in (("top1", "accuracy"), ("balanced_accuracy", "balanced accuracy"))
        ),
    ]
    return "\n".join(lines) + "\n"
