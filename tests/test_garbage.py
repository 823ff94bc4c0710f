"""The collector of a process while a worker works in it, and afterwards."""

from __future__ import annotations

import gc
import weakref

import pytest

from upload_pipeline.garbage import YOUNG, seldom_collected


class Node:
    """One that can be in a cycle."""

    other: Node


def a_cycle() -> weakref.ref[Node]:
    node = Node()
    node.other = node
    return weakref.ref(node)


@pytest.fixture
def as_it_was() -> tuple[tuple[int, int, int], int]:
    return gc.get_threshold(), gc.get_freeze_count()


def test_it_looks_less_often_and_not_at_what_was_there(as_it_was: tuple[tuple[int, int, int], int]) -> None:
    with seldom_collected():
        assert gc.get_threshold() == (YOUNG, *as_it_was[0][1:])
        assert gc.get_freeze_count() > as_it_was[1]
        made = a_cycle()
        gc.collect()
        assert made() is None, "what is made meanwhile is collected"


def test_afterwards_it_is_as_before_also_behind_a_failure_and_where_two_were_nested(
    as_it_was: tuple[tuple[int, int, int], int],
) -> None:
    with pytest.raises(ValueError, match="oops"), seldom_collected(), seldom_collected():
        raise ValueError("oops")
    assert (gc.get_threshold(), gc.get_freeze_count()) == as_it_was
