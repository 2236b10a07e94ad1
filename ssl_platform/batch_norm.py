"""Batch norm over all ranks, on CPUs as well as on GPUs: any number of ranks normalises as one process does."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_platform import distributed
from ssl_platform.config import ConfigError


class BatchNorm(_BatchNorm):
    """nn.BatchNorm1d and 2d, (N, C, ...) -> (N, C, ...), with the mean and variance of the rows of all ranks.

    Statistics are those of one call. Backbones call it once for each group of views, so each resolution is normalised by
    itself, as DINO does; heads see all views of a network at once. Ranks may bring different numbers of rows, or none, but
    all must call it. One process alone gets torch's own kernel, bit for bit.

    Each call in training mode moves the running statistics, so once for each group and micro-batch; values that are not
    finite leave them as they are, as the step is skipped. Evaluation mode uses them and calls no collective. Blocks that
    hold it cannot be recomputed (`blocks.recompute_blocks`), because they would move twice.
    """

    def forward(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        weight, bias = (None if tensor is None else tensor.float() for tensor in (self.weight, self.bias))
        if x.dtype == torch.float64:
            weight, bias = self.weight, self.bias
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, weight, bias, False, 0.0, self.eps)
        assert self.num_batches_tracked is not None
        with torch.no_grad():
            self.num_batches_tracked += 1
        if distributed.world_size() == 1:
            return self._alone(x, weight, bias)
        result: tuple[Tensor, Tensor, Tensor, Tensor] = _OverRanks.apply(x, weight, bias, self.eps)
        normalised, mean, variance, count = result
        with torch.no_grad():
            unbiased = variance * (count / (count - 1).clamp_min(1))
            self._keep(
                torch.lerp(self.running_mean, mean.to(self.running_mean), self.momentum),
                torch.lerp(self.running_var, unbiased.to(self.running_var), self.momentum),
            )
        return normalised

    def _alone(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        rows = x.numel() // x.shape[1]
        if rows == 0:
            return x
        if rows == 1:
            raise ConfigError(
                ["batch norm while training needs more than one view or frame to take statistics of: raise batch_size"]
            )
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        # Copies, because the backward pass of an earlier call still refers to those that it was given.
        mean, variance = self.running_mean.clone(), self.running_var.clone()
        normalised = F.batch_norm(x, mean, variance, weight, bias, True, self.momentum, self.eps)
        self._keep(mean, variance)
        return normalised

    @torch.no_grad()
    def _keep(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        finite = (mean.isfinite() & variance.isfinite()).all()
        self.running_mean.copy_(torch.where(finite, mean, self.running_mean))
        self.running_var.copy_(torch.where(finite, variance, self.running_var))


class _OverRanks(torch.autograd.Function):
    """(x, weight, bias, eps) -> normalised x, mean (C,), biased variance (C,), number of values of each channel (1,).

    One collective in each direction. Ranks' means and squared deviations are put together as Chan et al. (1979) do, which
    unlike sums of squares loses nothing where the mean is large. The gradient is that of the sum of all ranks' losses.
    """

    @staticmethod
    def forward(
        context: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        axes, channels, wide = _axes(x), x.shape[1], _wide(x)
        count = wide.new_full((1,), x.numel() // channels)
        variance, mean = (
            torch.var_mean(wide, axes, correction=0)
            if x.numel()
            else (wide.new_zeros(channels), wide.new_zeros(channels))
        )
        every = distributed.gather(torch.cat([count, mean, variance])[None])  # (ranks, 1 + 2 C)
        counts, means, variances = torch.split(every, [1, channels, channels], 1)
        count = counts.sum(0)
        mean = (counts * means).sum(0) / count
        variance = (counts * (variances + (means - mean).square())).sum(0) / count
        scale = (variance + eps).rsqrt()
        context.save_for_backward(x, weight, mean, scale, count)
        normalised = (wide - _across(mean, x)) * _across(scale, x)
        if weight is not None and bias is not None:
            normalised = normalised * _across(weight, x) + _across(bias, x)
        context.mark_non_differentiable(mean, variance, count)
        return normalised.to(x.dtype), mean, variance, count

    @staticmethod
    def backward(context: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight, mean, scale, count = context.saved_tensors
        wide, axes = _wide(gradient), _axes(x)
        normalised = (_wide(x) - _across(mean, x)) * _across(scale, x)
        sums = torch.stack([wide.sum(axes), (wide * normalised).sum(axes)])  # of the bias, and of the weight
        shift, slope = (distributed.total(sums) / count).unbind()
        factor = scale if weight is None else scale * weight
        of_x = _across(factor, x) * (wide - _across(shift, x) - normalised * _across(slope, x))
        own = (None, None) if weight is None else (sums[1], sums[0])
        return of_x.to(x.dtype), *own, None


def _axes(x: Tensor) -> list[int]:
    """All but that of the channels."""
    return [axis for axis in range(x.ndim) if axis != 1]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _across(values: Tensor, x: Tensor) -> Tensor:
    """(C,) such that it broadcasts over `x`."""
    return values.view(-1, *[1] * (x.ndim - 2))


def has_batch_norm(module: nn.Module) -> bool:
    """Whether any layer of it, torch's or ours, keeps running statistics of batches."""
    return any(isinstance(layer, _BatchNorm) for layer in module.modules())
