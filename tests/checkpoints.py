"""A checkpoint written at once, from tensors: what the tests of reading, exporting and evaluating start from."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ssl_platform import checkpoint
from ssl_platform.checkpoint import TrainState


def write_checkpoint(
    folder: Path, state: TrainState, config_yaml: str, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]
) -> Path:
    """Writes `folder/step_XXXXXXXX` by the steps that `saving` takes in its thread, and returns it."""
    temporary = checkpoint.open_part(folder, state.step)
    groups = {
        name: {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        for name, tensors in (("model", model), ("optimizer", optimizer))
    }
    files = checkpoint.write_part(temporary, groups, 0, sharded=False)
    return checkpoint.commit(temporary, state, config_yaml, files, None)
