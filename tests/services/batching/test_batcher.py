"""The batcher, as properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.batching.batcher import Batcher

ITEMS = st.lists(st.tuples(st.integers(1, 40), st.booleans(), st.floats(0, 2)), max_size=30)


@given(items=ITEMS, max_batch=st.integers(1, 32))
def test_nothing_is_lost_doubled_or_overtaken_and_no_batch_exceeds_its_limit(
    items: list[tuple[int, bool, float]], max_batch: int
) -> None:
    """Batches laid end to end are the items; each holds at most `max_batch` images, or one item."""
    batcher: Batcher[int] = Batcher(max_batch=max_batch, max_wait_s=1.0)
    now_s = 0.0
    batches = []
    for number, (images, alone, pause_s) in enumerate(items):
        now_s += pause_s
        batcher.add(number, images, now_s, alone=alone)
        while batch := batcher.pop(now_s):
            batches.append(batch)
    while batch := batcher.pop(now_s + 1.0):
        batches.append(batch)
    assert [number for batch in batches for number in batch] == list(range(len(items)))
    assert len(batcher) == 0
    for batch in batches:
        assert len(batch) == 1 or sum(items[number][0] for number in batch) <= max_batch
        assert len(batch) == 1 or not any(items[number][1] for number in batch)


@given(items=ITEMS)
def test_no_item_waits_longer_than_max_wait(items: list[tuple[int, bool, float]]) -> None:
    """At the time that `due_s` names, a batch is there."""
    batcher: Batcher[int] = Batcher(max_batch=16, max_wait_s=0.5)
    now_s = 0.0
    for number, (images, alone, pause_s) in enumerate(items):
        now_s += pause_s
        batcher.add(number, images, now_s, alone=alone)
        due_s = batcher.due_s()
        assert due_s is not None
        if due_s <= now_s:
            assert batcher.pop(now_s)


def test_a_batch_waits_for_others_until_it_is_full_or_due() -> None:
    """Two items of 4 images fill a batch of 8 at once; one alone waits."""
    batcher: Batcher[str] = Batcher(max_batch=8, max_wait_s=1.0)
    batcher.add("a", 4, 0.0)
    assert batcher.pop(0.9) == []
    assert batcher.room == 4
    batcher.add("b", 4, 0.9)
    assert batcher.pop(0.9) == ["a", "b"]
    batcher.add("c", 4, 2.0)
    assert batcher.due_s() == 3.0
    assert batcher.pop(3.0) == ["c"]


def test_an_item_that_wants_to_be_alone_closes_the_batch_before_it() -> None:
    """Neither side waits for company that cannot come."""
    batcher: Batcher[str] = Batcher(max_batch=8, max_wait_s=1.0)
    batcher.add("a", 1, 0.0)
    batcher.add("suspect", 1, 0.0, alone=True)
    batcher.add("b", 1, 0.0)
    assert [batcher.pop(0.0), batcher.pop(0.0), batcher.pop(0.0)] == [["a"], ["suspect"], []]
    assert batcher.clear() == ["b"]


@pytest.mark.parametrize(("max_batch", "max_wait_s"), [(0, 1.0), (1, -1.0), (1, float("nan"))])
def test_limits_out_of_range_are_refused(max_batch: int, max_wait_s: float) -> None:
    """A batcher without sensible limits cannot be made."""
    with pytest.raises(ValueError, match=r"max_(batch|wait_s) is"):
        Batcher(max_batch=max_batch, max_wait_s=max_wait_s)


def test_an_empty_item_is_refused() -> None:
    """Batches are counted in images, so an item must have one."""
    with pytest.raises(ValueError, match="at least 1"):
        Batcher[str](max_batch=1, max_wait_s=0).add("a", 0, 0.0)
