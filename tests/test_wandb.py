"""Weights & Biases, with the real package and no network: the same run after a resume, and no paths or keys in it."""

import importlib.util
import os
import re
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from ssl_platform.log import start_wandb
from ssl_platform.recipe import load_recipe
from ssl_platform.run_folder import wandb_arguments
from ssl_platform.train import main

SMOKE = Path(__file__).parents[1] / "configs" / "smoke" / "pathology.yaml"
SECTION = "wandb={project: tried, mode: offline, name: first}"


@pytest.fixture
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, and no network even if it were asked for."""
    if importlib.util.find_spec("wandb") is None:
        pytest.skip("the package wandb is not installed")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    (tmp_path / "home").mkdir()
    return tmp_path


def records(file: Path) -> list[Any]:
    """What `wandb sync` would send, message by message.

    `finish` returns before wandb's own process has written the file (seen: 7 bytes, and 3,882 a moment later), so this
    waits for the record that ends a run.
    """
    deadline = time.monotonic() + 60
    while True:
        found = written(file.read_bytes())
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        assert time.monotonic() < deadline, f"{file}: no end of the run after a minute"
        time.sleep(0.05)


def written(data: bytes) -> list[Any]:
    """The messages that are there: LevelDB's log format behind seven bytes of wandb's own."""
    from wandb.proto import wandb_internal_pb2

    found: list[Any] = []
    message, place = b"", 7
    while place + 7 <= len(data):
        if (rest := 32768 - place % 32768) < 7:  # a block's end that no header fits into
            place += rest
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        if place + 7 + length > len(data):
            break  # still being written
        message += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            found.append(record)
            message = b""
    return found


def test_offline_run_resumed_keeps_its_id_and_tells_no_paths(quiet: Path) -> None:
    run_dir = quiet / "secret-run"
    common = [f"run_dir={run_dir}", "tensorboard=false", SECTION, "log_every=2", "save_every=4"]
    assert main([str(SMOKE), *common, "steps=4"]) == 0
    assert main([str(SMOKE), *common, "steps=6"]) == 0
    files = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    messages = [record for file in files for record in records(file)]
    ids = {record.run.run_id for record in messages if record.WhichOneof("record_type") == "run"}
    assert ids == {(run_dir / "wandb_id").read_text()}
    steps = [
        item.value_json
        for record in messages
        if record.WhichOneof("record_type") == "history"
        for item in record.history.item
        if item.key == "step" or list(item.nested_key) == ["step"]
    ]
    assert steps == ["2", "4", "6"]
    sent = str(messages)
    assert "num_prototypes" in sent and "dino_teacher_entropy" in sent and "tried" in sent
    shards = sorted((SMOKE.parents[2] / "tests/data/skin_tiles").glob("*.tar"))
    keys = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            keys += [name.partition(".")[0] for name in tar.getnames()]
    secrets = {"secret-run", str(quiet), str(SMOKE.parents[2]), os.uname().nodename, "skin_tiles", *keys}
    uploaded = [path.read_text(errors="replace") for path in run_dir.glob("wandb/*/files/**/*") if path.is_file()]
    for text in (sent, *uploaded):
        # As words: a random identifier of wandb's may well hold the two letters of a short host name.
        assert not [secret for secret in secrets if re.search(rf"(?<!\w){re.escape(secret)}(?!\w)", text)]


def test_a_run_that_goes_on_in_the_same_second_keeps_what_it_sent(quiet: Path) -> None:
    """wandb names its folders by the second: a run that is stopped and resumed at once must not lose its first figures."""
    for step in range(4):
        run = start_wandb(quiet, project="tried", mode="offline", entity=None, name=None, config={})
        run.log({"step": step})
        run.finish()
    files = [file for file in quiet.glob("wandb/offline-run-*/*.wandb")]
    assert len(files) == 4
    found = [str(records(file)) for file in files]
    assert all(sum(f'nested_key: "step"\n    value_json: "{step}"' in text for text in found) == 1 for step in range(4))


def test_the_configuration_that_is_sent_has_no_paths() -> None:
    recipe = load_recipe(SMOKE, [SECTION, "data.shards=[/a/secret, ../b]"])
    arguments = wandb_arguments(recipe)
    assert arguments is not None and arguments["project"] == "tried" and arguments["mode"] == "offline"
    config = arguments["config"]
    assert "run_dir" not in config and "shards" not in config["data"]
    assert config["heads"]["dino"]["num_prototypes"] == 64 and config["modality"]["crops"]["global"]["size"] == 32
    assert wandb_arguments(load_recipe(SMOKE)) is None


def test_a_missing_package_is_an_error_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else found(name, *rest)
    )
    assert main([str(SMOKE), f"run_dir={tmp_path / 'run'}", SECTION]) == 1
    error = capsys.readouterr().err
    assert "wandb: the package is not installed; pip install 'ssl-platform[wandb]', or leave the section out" in error


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("wandb={mode: offline}", "wandb.project: missing, and it has no default"),
        ("wandb={project: a, mode: sometimes}", "wandb.mode: input should be 'online' or 'offline'"),
        ("wandb={projekt: a}", "wandb.projekt: unknown key; did you mean 'project'?"),
    ],
)
def test_errors_in_the_section(section: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(SMOKE), section]) == 1
    assert message in capsys.readouterr().err
