"""Nearest neighbours: does the encoder put samples of one class next to each other? No training, so nothing to tune.

Each test sample gets the class that its k most similar train samples vote for (cosine of the CLS features), weighted by
exp(similarity / temperature). Beside the checkpoint stand, on the same samples, the same network with random weights
and the raw pixels: an encoder that does not beat both has learnt nothing that these labels can show.

what comes out:
  a table with balanced accuracy (mean over the classes of the share predicted right) and top-1 for each k, each with
  its 95 % interval over the test groups (patients, slides, speakers); below it, in words, whether the checkpoint beats
  each baseline; and DIR/knn.json with everything: settings, counts, per-class recall, confusion, differences, versions.

examples:
  ssl-eval knn --checkpoint runs/skin --train 'shards/train-*.tar' --test 'shards/test-*.tar'
  ssl-eval knn --checkpoint runs/skin --train shards/all --test shards/all --exclude-same-group   # leave one group out
  ssl-eval knn --checkpoint export/skin --train A.tar --test B.tar --k 5 20 --headline-k 5 --out results/skin
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from eval_protocols import metrics, report
from eval_protocols.features import FeatureSet, add_input_arguments, first_bad, positive, read_features
from eval_protocols.metrics import Floats, Integers
from eval_protocols.neighbours import Neighbours, most_excluded, nearest

Definition = Literal["dino", "dinov2"]
TITLES = {"random": "random initialisation"}


# -- votes -----------------------------------------------------------------------------------------------------------


def votes(
    neighbours: Neighbours, train_labels: Integers, k: int, num_classes: int, temperature: float, definition: Definition
) -> Floats:
    """What the first k of K neighbours say (M, C), exactly as the two references compute it.

    "dino" (`eval_knn.py`): the weight of a neighbour is exp(similarity / temperature).
    "dinov2" (`eval/knn.py`): softmax(similarity / temperature) over all K neighbours, cut after the first k: the votes
    sum to less than 1 for k < K and depend on K. Both give the same class; `knn_scores` makes probabilities of either.
    """
    weights = neighbours.similarities / temperature  # (M, K)
    if definition == "dinov2":
        weights = weights - weights.max(1, keepdims=True)
    weights = np.exp(weights)
    if definition == "dinov2":
        weights /= weights.sum(1, keepdims=True)
    cells = np.arange(len(weights))[:, None] * num_classes + train_labels[neighbours.rows]  # (M, K)
    total = np.bincount(cells[:, :k].ravel(), weights[:, :k].ravel(), minlength=len(weights) * num_classes)
    return total.astype(np.float64).reshape(len(weights), num_classes)


def knn_scores(
    train: FeatureSet,
    test: FeatureSet,
    ks: Sequence[int],
    *,
    temperature: float = 0.07,
    definition: Definition = "dinov2",
    exclude_same_group: bool = False,
) -> dict[int, Floats]:
    """{k: class probabilities (M, C) of the test samples}, renormalised for each k so that rows sum to 1.

    No sample is its own neighbour: where both splits hold it, it is left out by its id (not by its rank: among
    duplicates another may come first). exclude_same_group leaves out all train samples of its group too.
    A k beyond the number of train samples that every test sample may use is lowered to it.
    Raises ValueError if the splits do not fit together or a feature is not finite.
    """
    if train.label_names != test.label_names:
        raise ValueError("train and test features have different classes; match them first (splits.match)")
    if train.features.shape[1] != test.features.shape[1]:
        raise ValueError(
            f"train features have {train.features.shape[1]} dimensions and test features {test.features.shape[1]}: "
            "they are not of the same network and preprocessing"
        )
    for name, split in {"train": train, "test": test}.items():
        if (bad := first_bad(split.features)) is not None:
            raise ValueError(f"the {name} features of the sample with id {split.ids[bad]} are not all finite numbers")
    check_temperature(temperature, definition)
    ks = usable_ks(ks, train, test, exclude_same_group)
    order = np.argsort(train.ids, kind="stable")  # ties go to the lower id
    keys = exclusion_keys(train, test, exclude_same_group)
    found = nearest(train.features[order], test.features, max(ks), train_keys=keys[0][order], test_keys=keys[1])
    scores = {}
    for k in ks:
        raw = votes(found, train.labels[order], k, len(train.label_names), temperature, definition)
        scores[k] = raw / raw.sum(1, keepdims=True)
    return scores


def check_temperature(temperature: float, definition: Definition) -> None:
    """Raises ValueError if the weights would not be finite numbers."""
    if not 0 < temperature < float("inf") or (definition == "dino" and temperature < 1 / 700):
        raise ValueError(f"--temperature {temperature}: must be above 0, for dino's exp(1 / temperature) above 1/700")


def exclusion_keys(train: FeatureSet, test: FeatureSet, exclude_same_group: bool) -> tuple[Integers, Integers]:
    """Keys (N,) and (M,) for `nearest`: rows with the same key are never neighbours."""
    first_free = 1 + max(train.groups.max(initial=-1), test.groups.max(initial=-1))
    keys = [first_free + split.ids for split in (train, test)]
    if exclude_same_group:
        keys = [
            np.where(split.groups >= 0, split.groups, alone) for split, alone in zip((train, test), keys, strict=True)
        ]
    return keys[0], keys[1]


def usable_ks(ks: Sequence[int], train: FeatureSet, test: FeatureSet, exclude_same_group: bool) -> list[int]:
    """`ks`, each at most the number of train samples that every test sample may use, ascending and without repeats."""
    available = len(train.ids) - most_excluded(*exclusion_keys(train, test, exclude_same_group))
    if available < 1:
        raise ValueError("a test sample has no train sample left to compare with: all are of its own group")
    return sorted({min(k, available) for k in ks})


# -- the protocol ----------------------------------------------------------------------------------------------------


def score(
    networks: Mapping[str, tuple[FeatureSet, FeatureSet]],
    *,
    ks: Sequence[int],
    headline_k: int,
    temperature: float = 0.07,
    definition: Definition = "dinov2",
    exclude_same_group: bool = False,
    n_boot: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """The figures of {name: (train, test)} features for each k, and of the first network minus each of the others.

    Every network has the same samples in the same order. `headline_k` (one of `ks`) is the k that conclusions are drawn
    from: the caller's choice, made before any score is known.
    """
    name, *baselines = networks
    test, headline = networks[name][1], usable_ks([headline_k], *networks[name], exclude_same_group)[0]
    voting: dict[str, Any] = {"temperature": temperature, "definition": definition}
    voting["exclude_same_group"] = exclude_same_group
    predictions = {
        each: {k: scores.argmax(1) for k, scores in knn_scores(*sets, ks, **voting).items()}
        for each, sets in networks.items()
    }
    num_classes = len(test.label_names)
    resampling: dict[str, Any] = {"groups": test.groups, "n_boot": n_boot, "seed": seed}
    results: dict[str, dict[int, dict[str, Any]]] = {each: {} for each in networks}
    for each, by_k in predictions.items():
        for k, predicted in by_k.items():
            confusion = metrics.confusion_matrix(test.labels, predicted, num_classes)
            figures = metrics.bootstrap(test.labels, predicted, num_classes, **resampling)
            results[each][k] = {**figures, "per_class_recall": metrics.recall(confusion)}
            if k == headline:
                results[each][k]["confusion"] = confusion
    differences = {
        other: {
            k: metrics.paired_bootstrap(test.labels, predicted, predictions[other][k], num_classes, **resampling)
            for k, predicted in predictions[name].items()
        }
        for other in baselines
    }
    return {"headline_k": headline, "results": results, "differences": differences}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `ssl-eval knn`."""
    add_input_arguments(parser)
    group = parser.add_argument_group("nearest neighbours")
    k_help = "neighbours that vote; each is scored (10 20 100 200)"
    group.add_argument("--k", type=positive, nargs="+", default=[10, 20, 100, 200], metavar="K", help=k_help)
    group.add_argument(
        "--headline-k",
        type=positive,
        metavar="K",
        help="the k that the conclusion is drawn from, one of --k, fixed beforehand (20, or the first --k)",
    )
    group.add_argument("--temperature", type=float, default=0.07, metavar="T", help="of the weights (%(default)s)")
    group.add_argument(
        "--definition",
        choices=("dino", "dinov2"),
        default="dinov2",
        help="weights exp(similarity / T), or softmax over the largest k, then cut; same predictions (%(default)s)",
    )
    group.add_argument(
        "--exclude-same-group",
        action="store_true",
        help="no neighbour may be of the test sample's group: leaves one patient out where --train and --test overlap",
    )
    boot_help = "resamples of the test groups, for the intervals (%(default)s)"
    group.add_argument("--n-boot", type=positive, default=2000, metavar="N", help=boot_help)
    group.add_argument("--out", type=Path, metavar="DIR", help="folder for knn.json (eval/ and the PATH with dashes)")


def run(arguments: argparse.Namespace) -> int:
    """Scores a checkpoint; writes the table to standard output and the result to a JSON file."""
    headline_k = arguments.headline_k or (20 if 20 in arguments.k else arguments.k[0])
    if headline_k not in arguments.k:
        raise ValueError(f"--headline-k {headline_k}: not one of --k {' '.join(map(str, arguments.k))}")
    check_temperature(arguments.temperature, arguments.definition)
    folder = report.output_folder(arguments.out or report.default_folder(arguments.checkpoint))
    extracted = read_features(arguments)
    options = {
        "ks": arguments.k,
        "headline_k": headline_k,
        "temperature": arguments.temperature,
        "definition": arguments.definition,
        "exclude_same_group": arguments.exclude_same_group,
        "n_boot": arguments.n_boot,
        "seed": arguments.seed,
    }
    scored = score(extracted.networks, **options)
    train, test = next(iter(extracted.networks.values()))
    result = {
        "protocol": f"knn/{arguments.definition}@1",
        "settings": {**options, **_definition(options)},
        **extracted.facts,
        **scored,
        "notes": extracted.notes + _notes(options, train, test),
        "versions": report.versions(),
    }
    report.write_result(folder / "knn.json", result)
    _show(result, test)
    sys.stdout.write(f"\nwritten: {folder / 'knn.json'}\n")
    return 0


def _definition(options: Mapping[str, Any]) -> dict[str, Any]:
    """What else a second implementation would have to know to get the same numbers."""
    weights = {
        "dino": "exp(similarity / temperature)",
        "dinov2": "softmax(similarity / temperature) over the largest k, cut after the first k",
    }
    return {
        "similarity": "cosine",
        "normalisation": "L2 per sample, no centring",
        "precision": "features float32; candidates by faiss IndexFlatIP, order and weights in float64",
        "weights": weights[options["definition"]],
        "probabilities": "votes renormalised to sum 1 for each k",
        "ties": "similarity descending, then sample id ascending; of classes with equal votes the first",
        "layer": "last, after the final norm",
        "pooling": "cls",
        "exclusion": "the sample itself and its group" if options["exclude_same_group"] else "the sample itself",
        "interval": "95 % percentile bootstrap over test groups (samples without one alone); differences are paired",
    }


def _notes(options: Mapping[str, Any], train: FeatureSet, test: FeatureSet) -> list[str]:
    """What a reader must know to trust the figures."""
    found = []
    available = usable_ks([len(train.ids)], train, test, options["exclude_same_group"])[0]
    if lowered := [str(k) for k in options["ks"] if k > available]:
        found.append(f"k = {', '.join(lowered)} lowered to {available}: so many train samples may be neighbours.")
    if both := len(np.intersect1d(train.ids, test.ids)):
        found.append(f"{both} test samples are train samples too; none is its own neighbour.")
    overlap = len(np.intersect1d(train.groups[train.groups >= 0], test.groups[test.groups >= 0]))
    if overlap and not options["exclude_same_group"]:
        found.append(
            f"{overlap} groups are in both splits, so neighbours may be of the same patient, slide or speaker and the "
            "scores too high: split by group, or use --exclude-same-group."
        )
    units = metrics.num_units(len(test.labels), test.groups)
    if (test.groups < 0).all():
        found.append(
            "The test samples have no groups, so intervals resample single samples; if several come from one patient, "
            "slide or speaker, the true intervals are wider."
        )
    elif units < 10:
        found.append(f"There are only {units} test groups: their intervals are rough, and rather too narrow.")
    return found


def _show(result: Mapping[str, Any], test: FeatureSet) -> None:
    name, headline = next(iter(result["results"])), result["headline_k"]
    rows: list[list[str]] = []
    emphasised: list[int] = []
    for k in result["results"][name]:
        for each, by_k in result["results"].items():
            if k == headline:
                emphasised.append(len(rows))
            rows.append(
                [str(k), TITLES.get(each, each), *(report.interval_text(by_k[k][metric]) for metric in metrics.METRICS)]
            )
    present = int((np.bincount(test.labels) > 0).sum())
    sentences = [
        f"Headline: balanced accuracy at k = {headline}. A constant guess has {1 / present:.3f}, "
        f"and top-1 {metrics.majority_share(test.labels):.3f} if it is the most frequent class.",
        *(
            report.verdict(name, TITLES.get(each, each), by_k[headline]["balanced_accuracy"])
            for each, by_k in result["differences"].items()
        ),
        *(f"Note: {note}" for note in result["notes"]),
    ]
    title = f"{result['protocol']}  {result['checkpoint']['path']}  ({len(test.labels)} test samples)"
    columns = ["k", "features", "balanced accuracy [95 %]", "top-1 [95 %]"]
    report.show(title, columns, rows, emphasised=emphasised, sentences=sentences)
