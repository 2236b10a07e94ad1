"""Starts runs: one machine (`python -m launch.local`). Runs from a clone; it is no part of the installed package."""
