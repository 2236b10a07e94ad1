"""`ssl-eval verification`: drawn and listed trials, scores against a loop, what it writes and what it refuses."""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from eval_protocols.__main__ import main
from eval_protocols.trials import Trials, check_speakers, draw_trials, read_trials
from eval_protocols.verification import cosine_scores, score
from ssl_platform import train
from ssl_platform.data.index import Index
from ssl_platform.data.reading import ShardReader

ROOT = Path(__file__).parents[1]
VOICES = ROOT / "tests/data/voices"


# -- trials ------------------------------------------------------------------------------------------------------------


def test_all_pairs_of_a_speaker_if_they_are_few() -> None:
    speakers = np.array([0, 1, 0, 2, 1, 0, -1, 2])
    trials = draw_trials(speakers, per_speaker=100)
    targets = {tuple(pair) for pair in trials.pairs[trials.is_target].tolist()}
    same = {(a, b) for a, b in itertools.combinations(range(8), 2) if speakers[a] == speakers[b]}
    assert targets == same
    assert not (trials.pairs == 6).any()  # it has no speaker


def test_drawn_trials_are_balanced_over_speakers_distinct_and_the_same_again() -> None:
    speakers = np.random.default_rng(0).permutation(np.repeat(np.arange(6), [400, 30, 20, 20, 10, 2]))
    trials = draw_trials(speakers, per_speaker=50, seed=1)
    sides = speakers[trials.pairs]
    assert ((sides[:, 0] == sides[:, 1]) == trials.is_target).all()
    assert len({tuple(pair) for pair in trials.pairs.tolist()}) == len(trials.pairs)
    assert (trials.pairs[:, 0] != trials.pairs[:, 1]).all()
    assert Counter(sides[trials.is_target, 0].tolist()) == {0: 50, 1: 50, 2: 50, 3: 50, 4: 45, 5: 1}
    num_targets, num_others = trials.is_target.sum(), (~trials.is_target).sum()
    assert 0.9 * num_targets < num_others <= num_targets
    again = draw_trials(speakers, per_speaker=50, seed=1)
    np.testing.assert_array_equal(trials.pairs, again.pairs)
    assert not np.array_equal(trials.pairs[:50], draw_trials(speakers, per_speaker=50, seed=2).pairs[:50])


@pytest.mark.parametrize("speakers", [[0, 0, 0], [0, 1, 2], [-1, -1, 0]])
def test_labels_without_trials_are_refused(speakers: list[int]) -> None:
    with pytest.raises(ValueError, match="trials need two speakers, and one with two samples"):
        draw_trials(np.array(speakers))


def test_lists_of_both_forms(tmp_path: Path) -> None:
    keys = {"a/1": 0, "a/2": 1, "b/1": 2}
    (file := tmp_path / "trials.txt").write_text("1 a/1.wav a/2.wav\n\n0 a/1 b/1.wav\n")
    (other := tmp_path / "wespeaker.txt").write_text("a/1.wav a/2.wav target\na/1 b/1 nontarget\n")
    for trials in (read_trials(file, keys), read_trials(other, keys)):
        assert trials.pairs.tolist() == [[0, 1], [0, 2]] and trials.is_target.tolist() == [True, False]
    check_speakers(trials, np.array([0, 0, 1]), file)
    check_speakers(trials, np.array([0, -1, 1]), file)
    with pytest.raises(ValueError, match=r"trials.txt: 1 trials, the first is number 2, are not what the labels"):
        check_speakers(trials, np.array([0, 0, 0]), file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 a b\n0 a zzz.wav\n", "line 2: no sample with the key 'zzz.wav' in the shards, whose keys are such as 'a'"),
        ("a b\n", "line 1: expected `1 a b`"),
        ("a b same\n", "line 1: expected `1 a b`"),
        ("1 a b\n", "there are 1 trials, all of one kind"),
        ("", "there are 0 trials, all of one kind"),
    ],
)
def test_bad_lists(tmp_path: Path, text: str, message: str) -> None:
    (file := tmp_path / "trials.txt").write_text(text)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        read_trials(file, {"a": 0, "b": 1})


# -- scores ------------------------------------------------------------------------------------------------------------


def test_scores_are_cosines_after_the_mean_of_what_is_in_trials() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(6, 5)).astype(np.float32) + 3
    trials = Trials(np.array([[0, 1], [1, 2], [0, 4]]), np.array([True, False, False]))
    centred = features - features[[0, 1, 2, 4]].mean(0)
    expected = [
        centred[a] @ centred[b] / np.sqrt((centred[a] @ centred[a]) * (centred[b] @ centred[b]))
        for a, b in trials.pairs
    ]
    np.testing.assert_allclose(cosine_scores(features, trials), expected, rtol=1e-5)
    # What all features share changes nothing, and equal features give equal scores: a coin, not luck.
    np.testing.assert_allclose(cosine_scores(features + 100, trials), expected, atol=1e-3)
    same = score({"a": np.ones((6, 5), np.float32)}, trials, None)["results"]["a"]
    assert same["eer"].estimate == 0.5 and np.isnan(same["eer"].low)


def test_a_network_that_knows_speakers_is_told_from_one_that_does_not() -> None:
    rng = np.random.default_rng(0)
    speakers = np.repeat(np.arange(12), 8)
    good = (rng.normal(size=(12, 16))[speakers] + 0.4 * rng.normal(size=(96, 16))).astype(np.float32)
    noise = rng.normal(size=(96, 16)).astype(np.float32)
    trials = draw_trials(speakers, 500)
    found = score({"good": good, "noise": noise}, trials, speakers, n_boot=200)
    assert found["results"]["good"]["eer"].high < 0.1 < 0.3 < found["results"]["noise"]["eer"].low
    assert found["differences"]["noise"]["eer"].high < 0 and found["differences"]["noise"]["eer"].excludes_zero
    again = score({"good": good, "copy": good.copy()}, trials, speakers, n_boot=50)
    assert not again["differences"]["copy"]["eer"].excludes_zero
    assert again["results"]["good"] == score({"good": good}, trials, speakers, n_boot=50)["results"]["good"]


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verification") / "run"
    config = str(ROOT / "configs/smoke/speaker.yaml")
    noise = ["modality.noise=null", "modality.reverb=null", f"data.shards={VOICES}"]
    assert train.main([config, *noise, f"run_dir={folder}", "steps=1", "tensorboard=false"]) == 0
    return folder


def test_command(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["verification", "--checkpoint", str(run_dir), "--shards", str(VOICES), "--device", "cpu", "--n-boot", "50"]
    out = tmp_path / "drawn"
    assert main([*given, "--workers", "0", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "random initialisation" in text and "teacher minus pixels" in text
    assert "There are only 2 speakers" in text
    result = json.loads((out / "verification.json").read_text())
    data = result["data"]
    lines = [line.split("\t") for line in (out / "scores.tsv").read_text().splitlines()]
    assert lines[0] == ["first", "second", "trial", "teacher", "random", "pixels"]
    assert len(lines) - 1 == data["targets"] + data["others"]
    # The scores file suffices to find the figure again.
    scores = np.array([float(line[3]) for line in lines[1:]])
    is_target = np.array([line[2] == "target" for line in lines[1:]])
    thresholds = [-2.0, *sorted(set(scores.tolist()))]
    rates = [((scores[~is_target] > t).mean(), (scores[is_target] <= t).mean()) for t in thresholds]
    priors = np.linspace(0, 1, 2001)
    bayes = max(min(p * miss + (1 - p) * alarm for alarm, miss in rates) for p in priors)
    assert result["results"]["teacher"]["eer"]["estimate"] == pytest.approx(bayes, abs=2e-3)
    # Listed trials of the same pairs, by key, score the same.
    reader = ShardReader(Index.open(VOICES), cache_shards=1)
    keys = [reader.read(number).key for number in range(data["samples"])]
    pairs = [(keys[int(a)], keys[int(b)], kind) for a, b, kind, *_ in lines[1:]]
    (file := tmp_path / "list.txt").write_text("".join(f"{a} {b} {kind}\n" for a, b, kind in pairs))
    assert main([*given, "--workers", "0", "--trials", str(file), "--out", str(tmp_path / "listed")]) == 0
    listed = json.loads((tmp_path / "listed/verification.json").read_text())
    assert listed["results"]["teacher"]["eer"] == result["results"]["teacher"]["eer"]


def test_refusals(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["verification", "--checkpoint", str(run_dir), "--device", "cpu", "--out", str(tmp_path / "out")]
    for arguments, message in (
        (["--shards", str(tmp_path / "none")], "none: no such file or folder"),
        (["--shards", str(VOICES), "--trials", str(tmp_path / "none.txt")], "none.txt: cannot be read"),
    ):
        assert main([*given, *arguments]) == 2
        assert message in capsys.readouterr().err
