"""`ssl-eval knn`: neighbours and votes against loops and reference figures, splits, and the command."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from eval_protocols import __main__ as command
from eval_protocols import features, knn, neighbours, report
from eval_protocols.features import FeatureSet
from eval_protocols.metrics import Difference, Floats, Integers
from eval_protocols.splits import match
from ssl_platform import export
from ssl_platform.config import validate
from ssl_platform.data.index import Index
from ssl_platform.data.reading import ShardReader
from ssl_platform.encoder import Encoder
from ssl_platform.recipe import Recipe
from ssl_platform.train import train

DEFINITIONS: tuple[knn.Definition, ...] = ("dino", "dinov2")
CONFORMANCE = json.loads((Path(__file__).parent / "data/conformance/evaluation.json").read_text(encoding="utf-8"))


def uniform(count: int, offset: int = 0) -> Floats:
    """u(n, off) of the reference figures: inputs that need no random numbers."""
    values: Floats = np.sin((np.arange(count) + 1 + offset) * 12.9898) * 43758.5453
    return values - np.floor(values)


def unit(rows: NDArray[np.floating]) -> Floats:
    """Rows of length 1; rows of zeros stay."""
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    found: Floats = rows / np.where(lengths > 0, lengths, 1)
    return found


def feature_set(
    rows: NDArray[np.floating], labels: Sequence[int] | Integers, first_id: int = 0, **more: Any
) -> FeatureSet:
    """Features with these labels; ids count from `first_id`, no groups, names "0", "1", "2" unless given."""
    given = {
        "groups": np.full(len(rows), -1),
        "ids": first_id + np.arange(len(rows)),
        "label_names": ("0", "1", "2"),
        **more,
    }
    return FeatureSet(rows, np.asarray(labels), **given)


# -- reference figures -----------------------------------------------------------------------------------------------


@pytest.fixture
def conformance_case() -> tuple[FeatureSet, FeatureSet]:
    train = feature_set(unit((uniform(960) - 0.5).reshape(60, 16)), np.arange(60) % 3)
    test = feature_set(unit((uniform(80, 5000) - 0.5).reshape(5, 16)), np.zeros(5, np.int64), first_id=60)
    return train, test


@pytest.mark.parametrize("k", [5, 20])
def test_votes_equal_the_reference_figures(k: int, conformance_case: tuple[FeatureSet, FeatureSet]) -> None:
    train, test = conformance_case
    expected = CONFORMANCE["knn"]["res"][f"k{k}"]
    found = neighbours.nearest(train.features, test.features, 20)
    dino, dinov2 = (knn.votes(found, train.labels, k, 3, 0.07, definition) for definition in DEFINITIONS)
    np.testing.assert_allclose(dino, expected["dino_votes"], atol=1e-6)
    np.testing.assert_allclose(dinov2, expected["dinov2_probs(max_k=20)"], atol=1e-8)
    np.testing.assert_allclose(dinov2.sum(1), expected["dinov2_prob_sums"], atol=1e-6)
    assert expected["argmax_equal"] == (dino.argmax(1) == dinov2.argmax(1)).all()


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_probabilities_equal_the_reference_figures(
    definition: knn.Definition, conformance_case: tuple[FeatureSet, FeatureSet]
) -> None:
    """TRAP: DINOv2's own cut-off softmax sums to .77 - .95 here; renormalised, it does not depend on the other k."""
    train, test = conformance_case
    together = knn.knn_scores(train, test, [5, 20], definition=definition)
    alone = knn.knn_scores(train, test, [5], definition=definition)
    for k, scores in together.items():
        np.testing.assert_allclose(scores, CONFORMANCE["knn"]["res"][f"k{k}"]["renormalised"], atol=1e-8)
    np.testing.assert_allclose(alone[5], together[5], rtol=1e-12)


# -- neighbours against a loop ---------------------------------------------------------------------------------------


def reference_neighbours(
    train: NDArray[np.floating], test: NDArray[np.floating], k: int, forbidden: NDArray[np.bool_] | None = None
) -> Integers:
    """Sorted by (similarity descending, row ascending) in float64, one pair at a time; `forbidden` is (M, N)."""
    found = []
    for place, query in enumerate(test.astype(np.float64)):
        pairs = []
        for row, vector in enumerate(train.astype(np.float64)):
            lengths = np.sqrt((query**2).sum()) * np.sqrt((vector**2).sum())
            if forbidden is None or not forbidden[place, row]:
                pairs.append((-round(float((query * vector).sum() / (lengths or 1.0)), 12) + 0.0, row))
        found.append([row for _, row in sorted(pairs)[:k]])
    return np.array(found)


@given(
    seed=st.integers(0, 10_000),
    num_train=st.integers(1, 30),
    k=st.integers(1, 30),
    few_values=st.booleans(),
    keyed=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_neighbours_are_those_of_a_loop(seed: int, num_train: int, k: int, few_values: bool, keyed: bool) -> None:
    """Features of few values make duplicates, ties and rows of zeros common."""
    rng = np.random.default_rng(seed)
    train, test = (
        (rng.integers(-1, 2, (rows, 3)) if few_values else rng.normal(size=(rows, 3))).astype(np.float32)
        for rows in (num_train, 4)
    )
    train_keys, test_keys = rng.integers(-1, 4, num_train), rng.integers(-1, 4, 4)
    forbidden = (train_keys == test_keys[:, None]) & (test_keys >= 0)[:, None] & keyed
    k = min(k, num_train - int(forbidden.sum(1).max()))
    if k < 1:
        return
    keys = {"train_keys": train_keys, "test_keys": test_keys} if keyed else {}
    found = neighbours.nearest(train, test, k, **keys)
    expected = reference_neighbours(train, test, k, forbidden)
    np.testing.assert_array_equal(found.rows, expected)
    cosines = unit(test) @ unit(train).T
    np.testing.assert_allclose(found.similarities, np.take_along_axis(cosines, expected, 1), atol=1e-12)


@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-6, 0.0])
def test_candidates_of_faiss_lose_nothing(spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collapsed encoder (small spread) has cosines that float32 cannot tell apart: float64 settles them."""
    monkeypatch.setattr(neighbours, "MARGIN", 8)
    rng = np.random.default_rng(0)
    centre = rng.normal(size=64)
    train, test = ((centre + spread * rng.normal(size=(rows, 64))).astype(np.float32) for rows in (300, 40))
    found = neighbours.nearest(train, test, 20)
    cosines = (unit(test) @ unit(train).T).round(12)
    np.testing.assert_array_equal(found.rows, np.argsort(-cosines, axis=1, kind="stable")[:, :20])
    monkeypatch.setattr(neighbours, "MAX_WIDTH", 0)  # without faiss
    monkeypatch.setattr(neighbours, "BLOCK_ELEMENTS", 1000)
    dense = neighbours.nearest(train, test, 20)
    np.testing.assert_array_equal(found.rows, dense.rows)
    np.testing.assert_allclose(found.similarities, dense.similarities, atol=1e-13)


def test_scores_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(1)
    train = feature_set(rng.normal(size=(50, 8)).astype(np.float32), rng.integers(3, size=50))
    test = feature_set(rng.normal(size=(20, 8)).astype(np.float32), rng.integers(3, size=20), first_id=50)
    for definition in DEFINITIONS:
        for k, scores in knn.knn_scores(train, test, [1, 7], temperature=0.1, definition=definition).items():
            expected = np.zeros((20, 3))
            for place, rows in enumerate(reference_neighbours(train.features, test.features, k)):
                for row in rows:
                    cosine = float(unit(train.features)[row] @ unit(test.features)[place])
                    expected[place, train.labels[row]] += np.exp(cosine / 0.1)
            np.testing.assert_allclose(scores, expected / expected.sum(1, keepdims=True), rtol=1e-10, atol=1e-12)


def test_the_order_of_samples_does_not_matter() -> None:
    """Duplicates in the train split with different labels: the tie goes to the lower id, wherever it stands."""
    rng = np.random.default_rng(2)
    rows = np.repeat(rng.normal(size=(10, 4)), 3, axis=0).astype(np.float32)
    train, test = feature_set(rows, rng.integers(3, size=30)), feature_set(rows[::3] + 0.01, [0] * 10, first_id=30)
    shuffled = rng.permutation(30)
    moved = feature_set(rows[shuffled], train.labels[shuffled], ids=train.ids[shuffled])
    for k, scores in knn.knn_scores(train, test, [1, 2, 4]).items():
        np.testing.assert_allclose(knn.knn_scores(moved, test, [1, 2, 4])[k], scores, rtol=1e-12)


# -- who may be a neighbour ------------------------------------------------------------------------------------------


def test_no_sample_is_its_own_neighbour_even_among_duplicates() -> None:
    """TRAP: dropping the first of k + 1 neighbours is not leaving one out; here the duplicate has the lower id."""
    rows = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], np.float32)
    both = feature_set(rows, [0, 1, 1, 2])
    predicted = knn.knn_scores(both, both, [1])[1].argmax(1)
    np.testing.assert_array_equal(predicted, [1, 0, 2, 1])


def test_same_group_is_excluded_on_request() -> None:
    rows = np.array([[1, 0], [1, 0.01], [0, 1], [0, 1.01], [0.9, 1]], np.float32)
    both = feature_set(rows, [0, 0, 1, 1, 2], groups=np.array([7, 7, 7, 7, -1]))
    assert knn.knn_scores(both, both, [1])[1].argmax(1).tolist()[:4] == [0, 0, 1, 1]
    assert knn.knn_scores(both, both, [1], exclude_same_group=True)[1].argmax(1).tolist() == [2, 2, 2, 2, 1]
    one = feature_set(rows, [0, 0, 1, 1, 2], groups=np.full(5, 7))
    with pytest.raises(ValueError, match="no train sample left to compare with"):
        knn.knn_scores(one, one, [1], exclude_same_group=True)


def test_k_is_lowered_to_what_every_test_sample_may_use() -> None:
    rng = np.random.default_rng(3)
    train = feature_set(
        rng.normal(size=(9, 4)).astype(np.float32), np.arange(9) % 3, groups=np.array([0] * 4 + [1] * 5)
    )
    test = feature_set(rng.normal(size=(2, 4)).astype(np.float32), [0, 1], first_id=9, groups=np.array([0, 1]))
    assert list(knn.knn_scores(train, test, [200, 10, 5])) == [5, 9]
    assert list(knn.knn_scores(train, train, [200, 5])) == [5, 8]
    assert list(knn.knn_scores(train, test, [200, 2], exclude_same_group=True)) == [2, 4]


def test_features_that_do_not_fit_are_errors() -> None:
    rows = np.eye(4, 3, dtype=np.float32)
    train = feature_set(rows, [0, 1, 2, 0])
    with pytest.raises(ValueError, match="train features have 3 dimensions and test features 2"):
        knn.knn_scores(train, feature_set(rows[:, :2], [0, 1, 2, 0], first_id=4), [1])
    with pytest.raises(ValueError, match="different classes"):
        knn.knn_scores(train, feature_set(rows, [0, 1, 2, 0], first_id=4, label_names=("a", "b", "c")), [1])
    broken = rows.copy()
    broken[2, 0] = np.nan
    with pytest.raises(ValueError, match="test features of the sample with id 6 are not all finite"):
        knn.knn_scores(train, feature_set(broken, [0, 1, 2, 0], first_id=4), [1])
    wrong: list[tuple[float, knn.Definition]] = [
        (0.0, "dinov2"),
        (-1.0, "dino"),
        (float("nan"), "dinov2"),
        (1e-3, "dino"),
    ]
    for temperature, definition in wrong:
        with pytest.raises(ValueError, match="temperature"):
            knn.knn_scores(train, train, [1], temperature=temperature, definition=definition)


# -- splits ----------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One sample to be written to a shard."""

    vector: Sequence[float]
    label: str | int | None
    group: str | None = None


def write_shard(path: Path, rows: Sequence[Row]) -> Path:
    """A WebDataset tar; labels and groups in its JSON members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number, row in enumerate(rows):
            values = np.asarray(row.vector, np.float32).tobytes()
            about = {key: value for key, value in (("label", row.label), ("group", row.group)) if value is not None}
            for extension, contents in (("bin", values), ("json", json.dumps(about).encode())):
                member = tarfile.TarInfo(f"{path.stem}{number:04d}.{extension}")
                member.size = len(contents)
                archive.addfile(member, io.BytesIO(contents))
    return path


def opened(folder: Path, name: str, labels: Sequence[str | int | None], groups: Sequence[str | None] = ()) -> Index:
    rows = [Row([0.0], label, group) for label, group in zip(labels, groups or [None] * len(labels), strict=True)]
    return Index.open(write_shard(folder / name / f"{name}.tar", rows))


def test_labels_and_groups_are_matched_by_name(tmp_path: Path) -> None:
    """TRAP: both splits number their own names, so "cat" is 0 in one and 1 in the other."""
    train = opened(tmp_path, "a", ["cat", "dog", None, "cat"], ["p1", "p2", "p1", None])
    test = opened(tmp_path, "b", ["dog", "ant", "cat", None, "dog"], ["p2", "p0", "p3", "p1", None])
    left, right, counts = match(train, test)
    assert left.label_names == right.label_names == ("cat", "dog")
    assert (left.numbers.tolist(), left.labels.tolist()) == ([0, 1, 3], [0, 1, 0])
    assert (right.numbers.tolist(), right.labels.tolist()) == ([0, 2, 4], [1, 0, 1])
    assert left.groups[1] == right.groups[0] >= 0 and right.groups[1] not in left.groups and right.groups[2] == -1
    assert not set(left.ids) & set(right.ids)
    assert counts == {
        "train": 3,
        "test": 3,
        "train_groups": 2,
        "test_groups": 2,
        "train_without_label": 1,
        "test_without_label": 1,
        "test_label_not_in_train": 1,
        "samples_in_both": 0,
        "groups_in_both": 1,
    }


def test_numbered_labels_stand_for_themselves(tmp_path: Path) -> None:
    left, right, _ = match(opened(tmp_path, "a", [5, 2, 9, 2]), opened(tmp_path, "b", [9, 2, 2]))
    assert left.label_names == ("2", "5", "9")
    assert (left.labels.tolist(), right.labels.tolist()) == ([1, 0, 2, 0], [2, 0, 0])


def test_the_same_sample_has_the_same_id_in_both_splits(tmp_path: Path) -> None:
    first, second, third = (
        write_shard(tmp_path / f"{name}.tar", [Row([0.0], "cat"), Row([0.0], None), Row([0.0], "dog")])
        for name in "abc"
    )
    left, right, counts = match(Index.open([first, second]), Index.open([third, second]))
    assert left.ids.tolist() == [0, 2, 3, 5]
    assert right.ids.tolist() == [6, 8, 3, 5]
    assert counts["samples_in_both"] == 2


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (["cat", "dog"], [None, None], "--test: none of the 2 samples has a label"),
        ([None], ["cat", "dog"], "--train: none of the 1 samples has a label"),
        (["cat", "cat", None], ["cat", "dog"], "--train: every labelled sample is 'cat'"),
        (["cat", "dog"], ["dog", "dog"], "--test: every sample to be scored is 'dog'"),
        (
            ["cat", "dog"],
            ["ant", "bee"],
            "no label of the test split ('ant', 'bee') occurs in the train split ('cat', 'dog')",
        ),
        (["cat", "dog"], [0, 1], "no label of the test split ('0', '1') occurs in the train split"),
    ],
)
def test_splits_that_cannot_be_scored(
    train: list[str | int | None], test: list[str | int | None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as caught:
        match(opened(tmp_path, "a", train), opened(tmp_path, "b", test))
    assert message in str(caught.value)


# -- features --------------------------------------------------------------------------------------------------------


def test_pixels_are_flattened_and_bounded() -> None:
    small = torch.arange(2 * 3 * 32 * 32.0).reshape(2, 3, 32, 32)
    assert torch.equal(features.pixels(small), small.flatten(1))
    large = features.pixels(torch.arange(2 * 3 * 224 * 224.0).reshape(2, 3, 224, 224))
    assert large.shape == (2, 3 * 56 * 56)
    expected = torch.arange(4.0)[:, None] * 224 + torch.arange(4.0)  # the first 4 x 4 pixels
    assert large[0, 0] == expected.mean()
    assert features.pixels(torch.zeros(2, 1, 16, 112, 112)).shape[1] <= features.PIXEL_LIMIT
    assert features.pixels(torch.zeros(2, 1, 200_000)).shape[1] <= features.PIXEL_LIMIT
    assert features.pixels(torch.zeros(2, 7)).shape == (2, 7)


def test_features_that_are_not_finite_name_the_sample(tmp_path: Path) -> None:
    shards = [write_shard(tmp_path / f"{name}.tar", [Row([0.0], "cat"), Row([0.0], "dog")]) for name in "ab"]
    index = Index.open(shards)
    samples, _, _ = match(index, index)
    batches = [
        (torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0, 1, 2])),
        (torch.tensor([[0.0]]), torch.tensor([3])),
    ]
    networks = {"teacher": lambda views: 1 / views}
    options: dict[str, Any] = {"device": torch.device("cpu"), "description": "test features"}
    with pytest.raises(
        ValueError, match=r"test features, teacher: the features of sample 1 of .*b\.tar are not all finite"
    ):
        features.extract(batches, index, samples, networks, **options)
    found = features.extract(batches, index, samples, {"same": lambda views: views}, **options)["same"]
    assert found.features.tolist() == [[1.0], [2.0], [3.0], [0.0]]


# -- the command -----------------------------------------------------------------------------------------------------


class VectorModality:
    """Eight float32 numbers a sample."""

    def decode(self, record: dict[str, bytes]) -> Tensor:
        return torch.frombuffer(bytearray(record["bin"]), dtype=torch.float32)

    def preprocess(self, example: Tensor) -> Tensor:
        return example

    def description(self) -> dict[str, Any]:
        return {"input_size": [8]}


class VectorFeatures(NamedTuple):
    cls: Tensor


class VectorEncoder(nn.Module):
    """Knows that the first two of eight numbers matter; with random weights, a random projection."""

    modality = VectorModality()
    embed_dim = 2
    backbone: Any = None

    def __init__(self, random_init: bool) -> None:
        super().__init__()
        start = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
        self.weight = nn.Parameter(start if random_init else torch.eye(8, 2))
        self.config = SimpleNamespace(step=300, networks={"teacher": SimpleNamespace(backbone=self.backbone)})

    @classmethod
    def load(cls, path: Path, network: str = "teacher", random_init: bool = False) -> "VectorEncoder":
        if not path.exists():
            raise ValueError(f"{path}: no checkpoint here")
        return cls(random_init)

    def forward(self, views: Tensor) -> VectorFeatures:
        return VectorFeatures(views @ self.weight)


def clusters(seed: int, groups: str, count: int = 150, signal: float = 1.0) -> list[Row]:
    """Three classes on a circle in the first two numbers, loud noise in the others; ten samples a group."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        label = number % 3
        angle = 2 * np.pi * label / 3
        vector = np.concatenate(
            [signal * np.array([np.cos(angle), np.sin(angle)]) + rng.normal(size=2) * 0.3, rng.normal(size=6) * 3]
        )
        rows.append(Row(vector.tolist(), ("ant", "bee", "cat")[label], f"{groups}{number // 10}"))
    return rows


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(features, "Encoder", VectorEncoder)
    monkeypatch.chdir(tmp_path)
    write_shard(tmp_path / "train/a.tar", clusters(0, "p"))
    write_shard(tmp_path / "test/b.tar", clusters(1, "q"))
    (tmp_path / "runs/vectors").mkdir(parents=True)
    return tmp_path


COMMAND = ["knn", "--checkpoint", "runs/vectors", "--train", "train", "--test", "test"]
COMMAND += ["--workers", "0", "--device", "cpu", "--n-boot", "200"]


def run_command(*more: str) -> dict[str, Any]:
    assert command.main([*COMMAND, "--out", "out", *more]) == 0
    result: dict[str, Any] = json.loads(Path("out/knn.json").read_text(encoding="utf-8"))
    return result


def test_the_command_scores_and_writes_everything(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_command()
    text = capsys.readouterr().out
    assert result["protocol"] == "knn/dinov2@1"
    assert result["headline_k"] == 20
    assert set(result["results"]) == {"teacher", "random", "pixels"}
    assert set(result["results"]["teacher"]) == {"10", "20", "100", "150"}
    assert result["results"]["teacher"]["20"]["balanced_accuracy"]["estimate"] > 0.95
    assert result["results"]["pixels"]["20"]["balanced_accuracy"]["estimate"] < 0.8
    difference = result["differences"]["pixels"]["20"]["balanced_accuracy"]
    assert difference["excludes_zero"] and 0 < difference["low"] < difference["estimate"] < difference["high"]
    scored = result["results"]["teacher"]["20"]
    assert difference["estimate"] == pytest.approx(
        scored["balanced_accuracy"]["estimate"] - result["results"]["pixels"]["20"]["balanced_accuracy"]["estimate"]
    )
    assert np.trace(scored["confusion"]) / 150 == pytest.approx(scored["top1"]["estimate"])
    assert np.mean(scored["per_class_recall"]) == pytest.approx(scored["balanced_accuracy"]["estimate"])
    assert result["data"]["label_names"] == ["ant", "bee", "cat"]
    assert result["data"]["counts"]["test_groups"] == 15
    assert result["data"]["test_per_class"] == [50, 50, 50]
    assert result["settings"]["temperature"] == 0.07 and result["settings"]["seed"] == 0
    assert result["settings"]["pooling"] == "cls" and "renormalised" in result["settings"]["probabilities"]
    assert (result["checkpoint"]["path"], result["checkpoint"]["step"]) == ("runs/vectors", 300)
    assert result["versions"]["faiss-cpu"]
    assert "teacher beats pixels beyond the interval" in text
    assert "k = 200 lowered to 150" in text
    assert "Headline: balanced accuracy at k = 20. A constant guess has 0.333" in text


def test_the_command_repeats_itself(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run_command("--batch-size", "7")
    assert run_command("--workers", "1") == first
    other = run_command("--definition", "dino")
    assert other["protocol"] == "knn/dino@1"
    assert other["results"] == first["results"]
    reseeded = run_command("--seed", "1")["results"]["pixels"]["20"]["top1"]
    assert reseeded["estimate"] == first["results"]["pixels"]["20"]["top1"]["estimate"]
    assert reseeded["low"] != first["results"]["pixels"]["20"]["top1"]["low"]


def test_leaving_one_out_and_leaving_one_group_out(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same shards on both sides: a sample never finds itself, and on request nobody of its group."""
    alone = run_command("--test", "train")
    assert "150 test samples are train samples too" in " ".join(alone["notes"])
    assert "15 groups are in both splits" in " ".join(alone["notes"])
    assert alone["results"]["pixels"]["10"]["top1"]["estimate"] < 0.8  # 1.0 if each found itself
    without_group = run_command("--test", "train", "--exclude-same-group")
    assert set(without_group["results"]["teacher"]) == {"10", "20", "100", "140"}
    assert "groups are in both splits" not in " ".join(without_group["notes"])
    assert without_group["settings"]["exclusion"] == "the sample itself and its group"


def test_default_folder_and_no_baselines(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*COMMAND, "--baselines", "--k", "3", "5"]) == 0
    result = json.loads(Path("eval/runs-vectors/knn.json").read_text(encoding="utf-8"))
    assert (list(result["results"]), result["differences"], result["headline_k"]) == (["teacher"], {}, 3)


def test_a_run_that_began_with_released_weights_says_so(
    case: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not any("released weights" in note for note in run_command()["notes"])
    monkeypatch.setattr(VectorEncoder, "backbone", SimpleNamespace(pretrained=True))
    assert any("released weights" in note for note in run_command()["notes"])
    assert not any("released weights" in note for note in run_command("--baselines", "pixels")["notes"])


def test_samples_left_out_are_reported(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*clusters(1, "q", 60), Row([0.0] * 8, None), Row([0.0] * 8, "eel")]
    write_shard(case / "other/c.tar", [row._replace(group=None) for row in rows])
    result = run_command("--test", "other")
    assert result["data"]["counts"]["test"] == 60
    text = capsys.readouterr().out
    assert "1 test samples have no label and are left out" in text
    assert "1 test samples have a label that no train sample has" in text
    assert "The test samples have no groups" in text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--headline-k", "7"], "--headline-k 7: not one of --k 10 20 100 200"),
        (["--train", "nowhere"], "nowhere: no such file or folder"),
        (["--checkpoint", "runs/none"], "runs/none: no checkpoint here"),
        (["--device", "gpu"], "--device gpu: cannot be used"),
        (["--temperature", "0"], "--temperature 0.0: must be above 0"),
        (["--out", "train/a.tar"], "--out train/a.tar: cannot make this folder"),
    ],
)
def test_mistakes_are_one_readable_line(
    more: list[str], message: str, case: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([*COMMAND, *more]) == 2
    text = capsys.readouterr().err
    last = text.rstrip("\n").split("\n")[-1]
    assert last.startswith("ssl-eval: ") and message in last and "Traceback" not in text


@pytest.mark.parametrize("more", [["--k", "0"], ["--k", "ten"], ["--batch-size", "-1"], ["--baselines", "luck"]])
def test_options_are_checked(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main([*COMMAND, *more])
    assert caught.value.code == 2
    assert "usage: ssl-eval knn" in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--help"])
    assert "Nearest neighbours: does the encoder" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["knn", "--help"])
    text = capsys.readouterr().out
    assert all(part in text for part in ("examples:", "what comes out:", "--headline-k", "leave one group out"))


def test_protocols_are_the_modules_that_say_so() -> None:
    found = command.protocols()
    assert "knn" in found
    assert not {"features", "metrics", "neighbours", "report", "splits"} & set(found)


# -- a real run ------------------------------------------------------------------------------------------------------


def write_stripes(path: Path, count: int, seed: int) -> Path:
    """Noisy 16 x 16 grey images with horizontal or vertical stripes; eight images a group."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w") as archive:
        for number in range(count):
            stripes = np.broadcast_to(np.sin(np.arange(16) * 1.6 + rng.uniform(0, 6))[:, None], (16, 16))
            picture = 128 + 60 * (stripes.T if number % 2 else stripes) + rng.normal(size=(16, 16)) * 90
            encoded = io.BytesIO()
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(encoded, "png")
            about = json.dumps({"label": ("flat", "upright")[number % 2], "group": f"{path.stem}{number // 8}"})
            for extension, contents in (("png", encoded.getvalue()), ("json", about.encode())):
                member = tarfile.TarInfo(f"{number:03d}.{extension}")
                member.size = len(contents)
                archive.addfile(member, io.BytesIO(contents))
    return path


@pytest.fixture(scope="module")
def real_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of DINO, and an export; the folder that holds `run`, `export`, `train` and `test`."""
    folder = tmp_path_factory.mktemp("real")
    write_stripes(folder / "train/a.tar", 48, 0)
    write_stripes(folder / "test/b.tar", 40, 1)
    vit = {"name": "vit", "embed_dim": 24, "depth": 2, "num_heads": 2}
    crops = {"global": {"num": 2, "size": 16, "scale": [0.5, 1.0]}, "local": {"num": 2, "size": 8, "scale": [0.2, 0.5]}}
    head = {"name": "projection", "num_prototypes": 16, "hidden_dim": 24, "bottleneck_dim": 8, "num_layers": 2}
    recipe = validate(
        Recipe,
        {
            "run_dir": str(folder / "run"),
            "steps": 3,
            "batch_size": 8,
            "modality": {"name": "image", "channels": 1, "patch_size": 4, "crops": crops},
            "data": {"shards": str(folder / "train"), "workers": 0},
            "networks": {"student": {"backbone": vit}, "teacher": {"update": "ema", "of": "student", "momentum": 0.5}},
            "heads": {"dino": head},
            "objectives": {"dino": {"name": "dino", "teacher_temp": 0.04}},
            "optim": {"lr": 0.01},
            "tensorboard": False,
        },
    )
    train(recipe, torch.device("cpu"))
    assert export.main([str(folder / "run"), "--format", "timm", "--out", str(folder / "export")]) == 0
    return folder


def real_command(folder: Path, checkpoint: str, *more: str) -> dict[str, Any]:
    splits = ["--train", str(folder / "train"), "--test", str(folder / "test"), "--out", str(folder / "out")]
    options = ["--k", "3", "5", "--workers", "1", "--device", "cpu", "--n-boot", "100", "--batch-size", "16", *more]
    assert command.main(["knn", "--checkpoint", str(folder / checkpoint), *splits, *options]) == 0
    result: dict[str, Any] = json.loads((folder / "out/knn.json").read_text(encoding="utf-8"))
    return result


def test_a_real_run_is_scored_as_by_hand(real_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = real_command(real_run, "run")
    assert result["checkpoint"]["step"] == 3
    assert result["checkpoint"]["preprocessing"]
    assert result["data"]["counts"] | {"train": 48, "test": 40, "test_groups": 5} == result["data"]["counts"]
    encoders = {
        "teacher": Encoder.load(real_run / "run"),
        "random": Encoder.load(real_run / "run", random_init=True),
    }
    views, labels = {}, {}
    for name in ("train", "test"):
        index = Index.open(real_run / name)
        reader, modality = ShardReader(index, 2), encoders["teacher"].modality
        examples = [modality.decode(reader.read(number).members) for number in range(len(index))]
        views[name], labels[name] = torch.stack([modality.preprocess(each) for each in examples]), index.labels
    for name, network in {**encoders, "pixels": None}.items():
        rows = {split: each.flatten(1) if network is None else network(each).cls for split, each in views.items()}
        near = reference_neighbours(rows["train"].numpy(), rows["test"].numpy(), 3)
        cosines = unit(rows["test"].numpy()) @ unit(rows["train"].numpy()).T
        weights = np.exp(np.take_along_axis(cosines, near, 1) / 0.07)
        voted = (weights * labels["train"][near]).sum(1) / weights.sum(1) > 0.5  # labels are 0 and 1
        assert result["results"][name]["3"]["top1"]["estimate"] == pytest.approx((voted == labels["test"]).mean())
    figures = [by_k["3"]["top1"]["estimate"] for by_k in result["results"].values()]
    assert len(set(figures)) == 3 and max(figures) < 1  # or a mix-up would pass


def test_a_run_a_checkpoint_and_an_export_score_alike(real_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = [real_command(real_run, path)["results"] for path in ("run", "run/checkpoints/step_00000003", "export")]
    assert results[0] == results[1] == results[2]
    student = real_command(real_run, "run", "--network", "student", "--baselines", "pixels")["results"]
    assert list(student) == ["student", "pixels"]


def test_a_real_folder_that_is_no_checkpoint(real_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits = ["--train", str(real_run / "train"), "--test", str(real_run / "test"), "--out", str(real_run / "out")]
    for checkpoint, network, message in (
        ("train", "teacher", "neither a run folder with a checkpoint"),
        ("run", "nobody", "has no network 'nobody', but student, teacher"),
    ):
        given = ["--checkpoint", str(real_run / checkpoint), "--network", network]
        assert command.main(["knn", *given, *splits]) == 2
        assert message in capsys.readouterr().err


# -- reports ---------------------------------------------------------------------------------------------------------


def test_verdicts_in_words() -> None:
    nan = float("nan")
    assert "teacher beats pixels beyond" in report.verdict("teacher", "pixels", Difference(0.2, 0.1, 0.3))
    assert "does not show that teacher beats" in report.verdict("teacher", "pixels", Difference(0.2, -0.1, 0.3))
    assert "WORSE than pixels" in report.verdict("teacher", "pixels", Difference(-0.2, -0.3, -0.1))
    assert "cannot be said" in report.verdict("teacher", "pixels", Difference(0.2, nan, nan))
    assert report.verdict("teacher", "pixels", Difference(0.2, 0.1, 0.3)).startswith(
        "teacher minus pixels: +0.200 [+0.100, +0.300]"
    )


def test_results_are_plain_json_and_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "knn.json"
    result: dict[Any, Any] = {
        "a": Difference(0.5, float("nan"), 1.0),
        20: np.array([1.0, np.inf]),
        "path": tmp_path,
        "n": np.int64(3),
    }
    report.write_result(path, result)
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "a": {"estimate": 0.5, "low": None, "high": 1.0, "excludes_zero": False},
        "20": [1.0, None],
        "path": str(tmp_path),
        "n": 3,
    }
    with pytest.raises(TypeError):
        report.write_result(path, {"a": object()})
    assert [file.name for file in tmp_path.iterdir()] == ["knn.json"]
    assert "excludes_zero" in path.read_text(encoding="utf-8")
