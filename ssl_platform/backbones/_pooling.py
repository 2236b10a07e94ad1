"""Frames to one vector: mean and standard deviation over time, plain or with learned weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST_VARIANCE = 1e-8
"""Added to variances, so that a channel which is constant in time has a gradient."""


def statistics(frames: Tensor, weights: Tensor | None = None) -> Tensor:
    """(B, D, T) -> (B, 2 D): mean and standard deviation over time, in float32 inside.

    `weights` (B, D, T) add up to 1 over time; None = 1 / T each, so that variances are divided by T and one frame is enough.
    """
    x = frames if frames.dtype == torch.float64 else frames.float()
    if weights is None:
        variance, mean = torch.var_mean(x, 2, correction=0)
    else:
        mean = (weights * x).sum(2)
        variance = (weights * (x - mean[..., None]).square()).sum(2)
    return torch.cat([mean, (variance + SMALLEST_VARIANCE).sqrt()], 1).to(frames.dtype)


class StatisticsPooling(nn.Module):
    """Mean and standard deviation over time (x-vectors; wespeaker's TSTP)."""

    def forward(self, frames: Tensor) -> Tensor:
        """(B, D, T) -> (B, 2 D)"""
        return statistics(frames)


class AttentiveStatisticsPooling(nn.Module):
    """Mean and standard deviation with a weight for each frame and channel (Desplanques et al. 2020, wespeaker's ASTP).

        weights = softmax over time of V tanh(W h + b) + k

    where h is the frame, with `global_context` beside the view's plain mean and standard deviation.
    """

    def __init__(self, channels: int, hidden_dim: int, global_context: bool) -> None:
        super().__init__()
        self.channels, self.global_context = channels, global_context
        self.hidden = nn.Conv1d(3 * channels if global_context else channels, hidden_dim, 1)
        self.scores = nn.Conv1d(hidden_dim, channels, 1)

    def forward(self, frames: Tensor) -> Tensor:
        """(B, D, T) -> (B, 2 D)"""
        weight = self.hidden.weight
        hidden = F.conv1d(frames, weight[:, : self.channels], self.hidden.bias)  # (B, hidden, T)
        if self.global_context:  # the same for every frame of a view, so it is multiplied once instead of T times
            hidden = hidden + F.linear(statistics(frames), weight[:, self.channels :, 0])[..., None]
        scores = self.scores(torch.tanh(hidden))
        return statistics(frames, (scores if scores.dtype == torch.float64 else scores.float()).softmax(2))
