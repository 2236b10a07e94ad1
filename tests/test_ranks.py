"""The pool of ranks itself: it answers, it reports what fails, and it starts afresh after that."""

import os
import time

import pytest

from ssl_platform import distributed
from tests.ranks import run_ranks


def who() -> tuple[int, int]:
    return distributed.rank(), os.getpid()


def fail_on_one() -> None:
    if distributed.rank() == 1:
        raise ValueError("told to")
    distributed.barrier()


def end_one() -> None:
    if distributed.rank() == 0:
        os._exit(3)
    time.sleep(60)


def test_ranks_are_reused_and_replaced_after_a_failure() -> None:
    first = run_ranks(2, who)
    assert [rank for rank, _ in first] == [0, 1]
    assert run_ranks(2, who) == first
    with pytest.raises(AssertionError, match="rank 1 failed:\n(.|\n)*told to"):
        run_ranks(2, fail_on_one)
    second = run_ranks(2, who)
    assert not {process for _, process in first} & {process for _, process in second}


def test_a_rank_that_dies_or_hangs_is_named() -> None:
    with pytest.raises(AssertionError, match="rank 0 died"):
        run_ranks(2, end_one)
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] have not answered within 0.5 s"):
        run_ranks(2, time.sleep, 30, timeout=0.5)
