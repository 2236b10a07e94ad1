"""How many bytes of tensors without memory would be alive at once."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context that adds up the memory of fake tensors: `alive` now, `peak` the most; masks with values may index them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive, self.peak = 0, 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default):
            args = (args[0], _positions(args[1]), *args[2:])
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, FakeTensor):
                self.add(tensor)
        return result

    def add(self, tensor: Tensor) -> None:
        """Counts the tensor's storage until it is freed."""
        storage = tensor.untyped_storage()  # the same object as long as the memory lives
        key = id(storage)
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.alive += self._sizes[key]
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key)

    def ignore(self, tensor: Tensor | None) -> None:
        """Counts the tensor's storage no longer: weights, gradients and the batch are counted apart."""
        assert tensor is not None
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._sizes:
            self.alive -= self._sizes[key]
        else:
            weakref.finalize(storage, self._forget, key)
        self._sizes[key] = 0

    def _forget(self, key: int) -> None:
        self.alive -= self._sizes.pop(key)


def _positions(indices: Any) -> list[Any]:
    """Masks as the positions that they choose, which tensors without values can be indexed by."""
    found: list[Any] = []
    for index in indices:
        is_mask = isinstance(index, Tensor) and not isinstance(index, FakeTensor) and index.dtype == torch.bool
        found += index.nonzero(as_tuple=True) if is_mask else [index]
    return found
