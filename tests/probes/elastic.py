"""The elastic backbone of the POA probe, as a plug-in of its own."""

from tests.probes.poa import BackboneConfig as Config

__all__ = ["Config"]
