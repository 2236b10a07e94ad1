"""Pretrain foundation models without labels: one student-teacher engine for many kinds of data."""

__version__ = "0.1.0"
