"""Pixels between two percentiles of the training data become [0, 1]: for 16-bit images that fill a part of their range."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssl_platform.modalities._images import channel_values


class IntensityRange:
    """The map of float32 pixels (..., C, H, W) in [0, 1] to the same, linear between both ends and clipped at them."""

    def __init__(self, percent: tuple[float, float], statistics: Mapping[str, Any], num_channels: int) -> None:
        """`percent` of the channels' `statistics`; raises ValueError if these do not have them, or they are equal."""
        percentiles = statistics.get("percentiles") or {}
        if not percentiles:
            raise ValueError(
                "intensity_range: needs the percentiles of the shards, which an older ssl-pack made; pack them again with "
                "--overwrite, or leave it out"
            )
        known = {float(share): values for share, values in percentiles.items()}
        if len(statistics["mean"]) > 1:  # of many channels, percentiles are of all together
            known = {s: v * len(statistics["mean"]) if len(v) == 1 else v for s, v in known.items()}
        if missing := [share for share in percent if share not in known]:
            kept = ", ".join(f"{share:g}" for share in sorted(known))
            raise ValueError(f"intensity_range: percentile {missing[0]:g} is not kept; use two of {kept}")
        low, high = (channel_values(known[share], num_channels, to_grey=False) for share in percent)
        if flat := [channel for channel, (one, other) in enumerate(zip(low, high, strict=True)) if one >= other]:
            raise ValueError(
                f"intensity_range: percentiles {percent[0]:g} and {percent[1]:g} of channel {flat[0]} are both "
                f"{low[flat[0]]:g}; use a wider range, such as [0.1, 99.9]"
            )
        self.percent = percent
        self.low = torch.tensor(low).view(-1, 1, 1)  # (C, 1, 1)
        self.span = torch.tensor(high).view(-1, 1, 1) - self.low

    def __call__(self, pixels: Tensor) -> Tensor:
        return ((pixels - self.low) / self.span).clamp_(0, 1)

    def statistics(self, before: Mapping[str, Any]) -> dict[str, list[float]]:
        """Mean and std after the map, as if nothing were clipped."""
        low, span = self.low.flatten(), self.span.flatten()
        mean, std = (torch.tensor(channel_values(before[key], len(low), to_grey=False)) for key in ("mean", "std"))
        return {"mean": ((mean - low) / span).tolist(), "std": (std / span).tolist()}

    def description(self) -> dict[str, Any]:
        """Which percentiles, and the pixels that become 0 and 1 in each channel."""
        low, high = self.low.flatten().tolist(), (self.low + self.span).flatten().tolist()
        return {"percentiles": list(self.percent), "low": low, "high": high}
