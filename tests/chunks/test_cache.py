"""The chunk cache: its bound, its order, and many threads at once."""

from __future__ import annotations

import random
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbsfs.chunks.cache import ChunkCache


def test_what_was_put_is_got_until_it_is_dropped() -> None:
    cache = ChunkCache(100)
    assert cache.get("a") is None
    assert "a" not in cache
    cache.put("a", b"x" * 40)
    assert cache.get("a") == b"x" * 40
    assert "a" in cache


def test_the_least_recently_used_goes_first() -> None:
    cache = ChunkCache(3)
    for name in "abc":
        cache.put(name, b"x")
    cache.get("a")
    cache.put("d", b"x")
    assert [name for name in "abcd" if name in cache] == ["a", "c", "d"]


def test_looking_whether_a_chunk_is_there_does_not_count_as_use() -> None:
    cache = ChunkCache(2)
    cache.put("a", b"x")
    cache.put("b", b"x")
    assert "a" in cache
    cache.put("c", b"x")
    assert "a" not in cache


def test_a_chunk_that_is_expected_to_be_read_goes_last() -> None:
    cache = ChunkCache(2)
    cache.put("a", b"x")
    cache.put("b", b"x")
    assert cache.expect("a")
    assert not cache.expect("c")
    cache.put("d", b"x")
    assert [name for name in "abd" if name in cache] == ["a", "d"]


def test_in_a_copy_what_was_read_goes_first_and_takes_little_room() -> None:
    cache = ChunkCache(10)
    assert cache.room_ahead == 5
    cache.is_for_copy = True
    assert cache.room_ahead == 8
    for name in "abcdef":
        cache.put(name, b"x")
    cache.put("g", b"x", is_read=True)
    for name in "fgf":
        assert cache.get(name) == b"x"
    assert all(name in cache for name in "abcdefg")
    assert cache.get("e") == b"x"
    assert "g" not in cache  # f was read after it
    assert cache.expect("e")  # it occurs again
    for name in "ba":
        assert cache.get(name) == b"x"
    assert [name for name in "abcdefg" if name in cache] == ["a", "b", "c", "d", "e"]
    assert cache.size == 5


def test_in_a_copy_a_large_chunk_stays_while_it_is_read() -> None:
    cache = ChunkCache(10)
    cache.is_for_copy = True
    cache.put("large", b"x" * 9)
    assert cache.get("large") == cache.get("large") == b"x" * 9
    cache.put("b", b"x", is_read=True)
    assert "large" not in cache
    assert cache.size == 1


def test_as_many_are_dropped_as_the_new_one_needs() -> None:
    cache = ChunkCache(10)
    for name in "abcde":
        cache.put(name, b"xx")
    cache.put("big", b"x" * 7)
    assert [name for name in (*"abcde", "big") if name in cache] == ["e", "big"]
    assert cache.size == 9


def test_what_could_never_fit_is_not_kept_and_drops_nothing() -> None:
    cache = ChunkCache(10)
    cache.put("a", b"x" * 10)
    cache.put("big", b"x" * 11)
    assert "big" not in cache
    assert cache.get("a") == b"x" * 10
    assert cache.size == 10


def test_a_chunk_that_is_put_again_counts_once() -> None:
    cache = ChunkCache(10)
    cache.put("a", b"x" * 6)
    cache.put("a", b"x" * 6)
    assert cache.size == 6
    cache.put("b", b"x" * 4)
    assert "a" in cache
    assert cache.size == 10


def test_a_cache_without_capacity_keeps_nothing() -> None:
    cache = ChunkCache(0)
    cache.put("a", b"x")
    assert cache.get("a") is None
    assert cache.size == 0


@given(
    capacity=st.integers(0, 30),
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(1, 12)), max_size=60),
)
def test_it_behaves_as_a_plain_list_in_order_of_use_would(
    capacity: int, steps: list[tuple[bool, int, int]]
) -> None:
    cache = ChunkCache(capacity)
    model: OrderedDict[int, bytes] = OrderedDict()
    for put, key, length in steps:
        if put:
            data = bytes([key]) * length
            cache.put(key, data)
            if length <= capacity:
                model.pop(key, None)
                model[key] = data
                while sum(map(len, model.values())) > capacity:
                    model.popitem(last=False)
        else:
            assert cache.get(key) == model.get(key)
            if key in model:
                model.move_to_end(key)
        assert cache.size == sum(map(len, model.values())) <= capacity
        assert {k for k in range(10) if k in cache} == set(model)


def test_whatever_is_done_with_a_chunk_is_done_under_the_lock() -> None:
    cache = ChunkCache(10)
    locked: list[bool] = []

    class Name:
        def __hash__(self) -> int:
            locked.append(cache._lock.locked())
            return 1

    name = Name()
    for action in (
        lambda: cache.put(name, b"x"),
        lambda: cache.get(name),
        lambda: name in cache,
    ):
        action()
        assert locked
        assert all(locked)
        locked.clear()


@pytest.fixture
def restless_threads() -> Iterator[None]:
    """Lets threads change places as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("restless_threads")
def test_threads_that_hammer_it_get_right_bytes_and_leave_a_right_size() -> None:
    cache = ChunkCache(400)
    start = threading.Barrier(6)
    wrong: list[str] = []

    def hammer(seed: int) -> None:
        source = random.Random(seed)
        start.wait()
        try:
            for _ in range(4000):
                key = source.randrange(12)
                data = cache.get(key)
                if data is None:
                    cache.put(key, bytes([key]) * (50 + key))
                elif data != bytes([key]) * (50 + key):
                    wrong.append(f"{key}: {data!r}")
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    kept = [data for key in range(12) if (data := cache.get(key)) is not None]
    assert cache.size == sum(map(len, kept)) <= 400
