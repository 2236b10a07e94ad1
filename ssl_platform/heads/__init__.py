"""Networks between embeddings and losses; one file a head, and the folder is the registry.

A head's module holds a class `Config` (of HeadConfig) whose `build(embed_dim)` makes it. The engine builds one for the
trained network `network` and an averaged copy for each network that follows it, so several objectives can share a head.
"""

from ssl_platform.config import PluginConfig


class HeadConfig(PluginConfig):
    """The keys that every head has."""

    network: str = "student"
    """The trained network whose embeddings it reads."""
