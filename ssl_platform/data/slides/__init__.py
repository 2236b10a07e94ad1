"""Whole slides: where their tiles lie at a given resolution, which of them are worth keeping, and their pixels."""
