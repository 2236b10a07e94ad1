"""Speaker verification: does the encoder tell whether two utterances are of one speaker? No training, nothing to tune.

A trial is two utterances; its score is the cosine of their CLS features, from which the mean over all utterances of the
trials is subtracted (no label is used for it). Labels of the shards are the speakers. Without --trials, trials are drawn:
of each speaker up to --trials-per-speaker pairs of own utterances, and as many pairs of one of its utterances and one of
another speaker, who is drawn first; the same shards and --seed give the same trials.

A file of trials has a line for each, as VoxCeleb's (`1 a.wav b.wav`) or wespeaker's (`a.wav b.wav target`): names are
keys of the shards (`ssl-pack --plain-names`), with or without the ending.

what comes out:
  a table with the equal error rate (on the convex hull of the error trade-off, and interpolated between thresholds; equal
  scores pass a threshold together) and the smallest detection cost for 1 % and 5 % targets, each with its 95 % interval
  over resampled speakers, for the checkpoint, the same network with random weights and the raw input; in words, whether
  the checkpoint beats each; DIR/verification.json with settings and versions, and DIR/scores.tsv with every trial.

examples:
  ssl-eval verification --checkpoint runs/speaker --shards shards/test
  ssl-eval verification --checkpoint runs/speaker --shards shards/vox1 --trials veri_test2.txt --out results/vox1-o
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval_protocols import detection, report
from eval_protocols.features import choose_device, extract, positive, scored_networks
from eval_protocols.knn import TITLES
from eval_protocols.metrics import Difference, Floats, Integers, Interval
from eval_protocols.splits import Samples
from eval_protocols.trials import Trials, check_speakers, draw_trials, read_trials
from ssl_platform.data.index import Index
from ssl_platform.data.reading import ShardReader
from ssl_platform.data.remote import RemoteSettings, add_cache_arguments
from ssl_platform.data.shards import preprocessed
from ssl_platform.data.tars import atomic_file
from ssl_platform.encoder import Encoder
from ssl_platform.location import location

HEADINGS = ("EER % [95 %]", "EER % interpolated", "minDCF .01", "minDCF .05")


# -- scores ------------------------------------------------------------------------------------------------------------


def cosine_scores(features: NDArray[np.floating], trials: Trials) -> Floats:
    """(N,): cosines of the two sides, after the mean of the features that occur in trials is subtracted."""
    used = np.unique(trials.pairs)
    centred = features.astype(np.float64) - features[used].mean(0, dtype=np.float64)
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    unit = centred / np.where(lengths > 0, lengths, 1.0)
    found: Floats = np.einsum("nd,nd->n", unit[trials.pairs[:, 0]], unit[trials.pairs[:, 1]])
    return found.round(12)  # equal features have equal scores, whatever the order of a sum


def score(
    networks: Mapping[str, NDArray[np.floating]],
    trials: Trials,
    speakers: Integers | None,
    *,
    n_boot: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """The figures of {name: features (M, D)}, and of the first minus each of the others on the same resamples.

    `speakers` (M,): whose each sample is; None, or -1 anywhere in the trials: no intervals.
    """
    scores = {name: cosine_scores(features, trials) for name, features in networks.items()}
    sides = None if speakers is None else speakers[trials.pairs]
    if sides is not None and (sides < 0).any():
        sides = None
    estimates, resamples = detection.resampled_figures(
        list(scores.values()), trials.is_target, sides, n_boot=n_boot, seed=seed
    )  # (E, metrics), (n_boot, E, metrics)
    names = list(networks)

    def intervals(estimate: Floats, drawn: Floats, kind: type[Interval]) -> dict[str, Interval]:
        bounds = np.quantile(drawn, [0.025, 0.975], axis=0) if len(drawn) > 1 else np.full((2, len(estimate)), np.nan)
        return {
            metric: kind(float(estimate[i]), float(bounds[0, i]), float(bounds[1, i]))
            for i, metric in enumerate(detection.METRICS)
        }

    return {
        "results": {name: intervals(estimates[i], resamples[:, i], Interval) for i, name in enumerate(names)},
        "differences": {
            name: intervals(estimates[0] - estimates[i], resamples[:, 0] - resamples[:, i], Difference)
            for i, name in enumerate(names)
            if i
        },
        "num_resamples": len(resamples),
        "scores": scores,
    }


# -- the protocol ------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `ssl-eval verification`."""
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="PATH", help="run folder (its latest), checkpoint or export"
    )
    parser.add_argument(
        "--shards", type=location, nargs="+", required=True, metavar="SHARDS", help="labelled by speaker"
    )
    parser.add_argument("--trials", type=Path, metavar="FILE", help="pairs to score (drawn from the labels)")
    parser.add_argument(
        "--trials-per-speaker", type=positive, default=500, metavar="N", help="of each kind, drawn (%(default)s)"
    )
    parser.add_argument("--network", default="teacher", metavar="NAME", help="which network (%(default)s)")
    parser.add_argument(
        "--baselines",
        nargs="*",
        choices=("random", "pixels"),
        default=["random", "pixels"],
        help="scored beside it: the network as it was before the first step, the preprocessed input (both)",
    )
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="samples at a time (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes that read (%(default)s)")
    add_cache_arguments(parser)
    parser.add_argument("--device", help="such as cpu or cuda:1 (a GPU if there is one)")
    parser.add_argument("--seed", type=int, default=0, help="of drawn trials and of the resampling (%(default)s)")
    parser.add_argument(
        "--n-boot", type=positive, default=2000, metavar="N", help="resamples of the speakers (%(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for what comes out (eval/ and the PATH with dashes)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Scores a checkpoint; writes the table to standard output, the result and the scores to files."""
    folder = report.output_folder(arguments.out or report.default_folder(arguments.checkpoint))
    index = Index.open(arguments.shards, RemoteSettings.of_arguments(arguments))
    speakers = index.labels
    keys: list[str] = []
    if arguments.trials is not None:
        keys = keys_of(index)
        trials = read_trials(arguments.trials, {key: number for number, key in enumerate(keys)})
        check_speakers(trials, speakers, arguments.trials)
    else:
        trials = draw_trials(speakers, arguments.trials_per_speaker, arguments.seed)
    used, rows = np.unique(trials.pairs, return_inverse=True)
    trials = trials._replace(pairs=rows.reshape(trials.pairs.shape))
    encoder, networks = _features(arguments, index, used)
    scored = score(networks, trials, speakers[used], n_boot=arguments.n_boot, seed=arguments.seed)
    scores = scored.pop("scores")
    names = [keys[number] if keys else str(number) for number in used]
    _write_scores(folder / "scores.tsv", names, trials, scores)
    result = {
        "protocol": "verification@1",
        "settings": {
            "trials": arguments.trials or f"drawn, {arguments.trials_per_speaker} of a speaker and kind at most",
            "score": "cosine of CLS features less their mean over all samples of the trials",
            "eer": "on the convex hull of the error rates; equal scores pass together",
            "interval": "95 % percentile bootstrap over speakers; trials of a speaker with its own copy are dropped",
            **{name: getattr(arguments, name) for name in ("n_boot", "seed")},
        },
        "checkpoint": {
            "path": str(arguments.checkpoint),
            "network": arguments.network,
            "step": encoder.config.step,
            "preprocessing": encoder.modality.description(),
        },
        "data": {"shards": [str(shard) for shard in index.shards], **_counts(trials, speakers[used])},
        **scored,
        "notes": _notes(trials, speakers[used], index.groups[used]),
        "versions": report.versions(),
    }
    report.write_result(folder / "verification.json", result)
    _show(result)
    sys.stdout.write(f"\nwritten: {folder / 'verification.json'}, {folder / 'scores.tsv'}\n")
    return 0


def keys_of(index: Index) -> list[str]:
    """The key of each sample."""
    reader = ShardReader(index, cache_shards=4)
    return [reader.read(number).key for number in range(len(index))]


def _features(
    arguments: argparse.Namespace, index: Index, used: Integers
) -> tuple[Encoder, dict[str, NDArray[np.floating]]]:
    """The encoder, and {name: features (M, D)} of the samples `used`."""
    device = choose_device(arguments.device)
    encoder, networks = scored_networks(arguments, device)
    samples = Samples(used, used, index.labels[used], index.groups[used], tuple(index.label_names))
    sizes = {"batch_size": arguments.batch_size, "workers": arguments.workers}
    with closing(preprocessed(index, encoder.modality, ids=used.tolist(), **sizes)) as batches:
        found = extract(batches, index, samples, networks, device=device, description="features")
    return encoder, {name: one.features for name, one in found.items()}


def _write_scores(file: Path, names: Sequence[str], trials: Trials, scores: Mapping[str, Floats]) -> None:
    """A line for each trial: both samples (keys, or numbers in the index), what it is, and each network's score."""
    lines = ["\t".join(["first", "second", "trial", *scores])]
    for row, (pair, target) in enumerate(zip(trials.pairs.tolist(), trials.is_target.tolist(), strict=True)):
        values = [f"{each[row]:.6f}" for each in scores.values()]
        lines.append("\t".join([*(names[side] for side in pair), "target" if target else "nontarget", *values]))
    with atomic_file(file) as out:
        out.write(("\n".join(lines) + "\n").encode())


def _counts(trials: Trials, speakers: Integers) -> dict[str, int]:
    return {
        "samples": len(speakers),
        "speakers": len(np.unique(speakers[speakers >= 0])),
        "targets": int(trials.is_target.sum()),
        "others": int((~trials.is_target).sum()),
    }


def _notes(trials: Trials, speakers: Integers, groups: Integers) -> list[str]:
    """What a reader must know to trust the figures."""
    found = []
    if (missing := int((speakers < 0).sum())) > 0:
        found.append(
            f"{missing} samples of the trials have no label, so there are no intervals: it is not known who is who."
        )
    elif (num := len(np.unique(speakers))) < 10:
        found.append(f"There are only {num} speakers: their intervals are rough, and rather too narrow.")
    sides = groups[trials.pairs[trials.is_target]]  # (targets, 2)
    if (sides < 0).any():
        found.append(
            "Samples have no groups: whether a target trial is two pieces of one recording session is unknown."
        )
    elif same := int((sides[:, 0] == sides[:, 1]).sum()):
        found.append(
            f"{same} of {len(sides)} target trials are two samples of one group (session, video): what they share may be "
            "the microphone and the room."
        )
    return found


def _show(result: Mapping[str, Any]) -> None:
    def percent(interval: Interval) -> Interval:
        return Interval(*(100 * value for value in interval))

    rows = []
    for name, found in result["results"].items():
        rates = [report.interval_text(percent(found[metric]), 1) for metric in detection.METRICS[:2]]
        costs = [report.interval_text(found[metric]) for metric in detection.METRICS[2:]]
        rows.append([TITLES.get(name, name), *rates, *costs])
    first = next(iter(result["results"]))
    data = result["data"]
    sentences = [
        report.verdict(first, TITLES.get(name, name), found["eer"], lower_is_better=True)
        for name, found in result["differences"].items()
    ]
    sentences += [f"Note: {note}" for note in result["notes"]]
    title = (
        f"{result['protocol']}  {result['checkpoint']['path']}  ({data['targets']} target trials, {data['others']} others, "
        f"{data['speakers']} speakers)"
    )
    report.show(title, ["features", *HEADINGS], rows, emphasised=[0], sentences=sentences)
