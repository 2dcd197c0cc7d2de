"""One limit for all memory: what is charged, who gives way in which order, and what is refused."""

from __future__ import annotations

import errno
import gc
import threading

import pytest

from pbsfs.base.errors import errno_of
from pbsfs.chunks.cache import ChunkCache
from pbsfs.runtime.memory import LEAST_CACHE, Charge, Memory, MemoryLimitError

MIB = 1 << 20


def with_cache(memory: Memory) -> ChunkCache:
    cache = ChunkCache(memory.cache_size)
    memory.resize_cache_with(cache.resize)
    return cache


def test_charges_beyond_the_open_limit_come_out_of_the_cache_down_to_its_least() -> None:
    memory = Memory(100 * MIB, 50 * MIB)
    cache = with_cache(memory)
    charge = memory.charge("files", 50 * MIB)
    assert cache.room == 100 * MIB
    charge.resize(51 * MIB)
    assert cache.room == 99 * MIB
    charge.resize(1000 * MIB)
    assert cache.room == LEAST_CACHE
    assert memory.excess() == 1000 * MIB - 150 * MIB + LEAST_CACHE
    charge.resize(0)
    assert cache.room == 100 * MIB


def test_a_small_cache_stays_as_it_is() -> None:
    memory = Memory(MIB, MIB)
    cache = with_cache(memory)
    memory.charge("files", 5 * MIB).resize(6 * MIB)
    assert cache.room == MIB


def test_a_limit_of_the_cache_lasts_and_leaves_its_least() -> None:
    memory = Memory(100 * MIB, 50 * MIB)
    cache = with_cache(memory)
    memory.limit_cache(60 * MIB)
    assert cache.room == 60 * MIB
    memory.limit_cache(80 * MIB)
    charge = memory.charge("files", 70 * MIB)
    assert cache.room == 60 * MIB
    charge.resize(100 * MIB)
    assert cache.room == 50 * MIB
    charge.resize(0)
    assert cache.room == 60 * MIB
    memory.limit_cache(0)
    assert cache.room == LEAST_CACHE


def test_the_cache_drops_chunks_when_it_shrinks() -> None:
    memory = Memory(LEAST_CACHE + MIB, 0)
    cache = with_cache(memory)
    for number in range(LEAST_CACHE // MIB + 1):
        cache.put(number, bytes(MIB))
    charge = memory.charge("files", MIB)
    assert cache.size == LEAST_CACHE
    assert 0 not in cache
    assert 1 in cache
    del charge


def test_a_charge_ends_with_its_object() -> None:
    memory = Memory(100 * MIB, 0)
    cache = with_cache(memory)
    charge = memory.charge("files", 10 * MIB)
    assert cache.room == 90 * MIB
    del charge
    memory.settle()
    assert cache.room == 100 * MIB
    assert memory.charged() == memory.charged("files") == 0


def test_what_does_not_fit_is_refused_and_leaves_nothing_charged() -> None:
    memory = Memory(0, 100)
    kept = [memory.admit("a: its 60 bytes", "open files", 60), memory.admit("b: 30 bytes", "listings", 30)]
    with pytest.raises(MemoryLimitError) as caught:
        memory.admit("c: its 11 bytes", "open files", 11)
    assert errno_of(caught.value) == errno.ENOMEM
    assert str(caught.value) == (
        "c: its 11 bytes do not fit in memory beside 60 bytes of open files and 30 bytes of listings "
        "(limit: 100 bytes with the cache); close some files, give a larger cache, or name "
        "fewer backups"
    )
    assert memory.charged() == 90
    kept.append(memory.admit("c: its 10 bytes", "open files", 10))
    kept.pop(0)
    kept.append(memory.admit("d: its 60 bytes", "open files", 60))
    assert memory.charged() == 100


def test_what_is_larger_than_the_limit_fits_alone() -> None:
    memory = Memory(0, 100)
    alone = memory.admit("a", "open files", 101)
    with pytest.raises(MemoryLimitError):
        memory.admit("b", "open files", 1)
    del alone
    memory.admit("b", "open files", 1)


def test_the_newest_reclaimer_is_asked_first_and_only_as_far_as_needed() -> None:
    memory = Memory(0, 100)
    asked: list[tuple[str, int]] = []
    charges: dict[str, Charge] = {
        name: memory.charge(name, 40, passing=True) for name in ("tables", "listings")
    }

    def reclaimer(name: str) -> None:
        def reclaim(excess: int) -> None:
            asked.append((name, excess))
            charges.pop(name, None)

        memory.reclaim_with(reclaim)

    reclaimer("tables")
    reclaimer("listings")
    first = memory.admit("a", "open files", 30)
    assert asked == [("listings", 10)]
    second = memory.admit("b", "open files", 70)
    assert asked == [("listings", 10), ("listings", 40), ("tables", 40)]
    assert memory.charged() == first.size + second.size == 100


def test_what_passes_is_not_a_reason_to_refuse() -> None:
    memory = Memory(0, 100)
    passing = memory.charge("open files", 80, passing=True)
    memory.admit("a", "open files", 90)
    assert passing.size == 80


def test_the_cache_gives_way_at_once_to_buffers_that_it_lends_its_part_to() -> None:
    memory = Memory(100 * MIB, 50 * MIB)
    cache = with_cache(memory)
    memory.lend(30 * MIB)
    assert cache.room == 70 * MIB
    tables = memory.charge("tables", 50 * MIB)
    assert cache.room == 70 * MIB
    tables.resize(60 * MIB)
    assert cache.room == 60 * MIB
    memory.lend(60 * MIB)
    assert cache.room == 32 * MIB
    assert memory.excess() == 60 * MIB - (150 - 32) * MIB  # to drop the tables would free no buffer
    tables.resize(0)
    memory.lend(-90 * MIB)
    assert cache.room == 100 * MIB


def test_threads_and_the_garbage_collector_may_change_charges_at_once() -> None:
    memory = Memory(64 * MIB, 0)
    cache = with_cache(memory)

    class Cycle:
        def __init__(self, charge: Charge) -> None:
            self.charge, self.itself = charge, self

    def work() -> None:
        own = memory.charge("buffers", 0)
        for size in range(300):
            Cycle(memory.charge("files", 7))
            own.resize(size)
            if size % 50 == 0:
                gc.collect()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert memory.charged() == 0
    assert cache.room == 64 * MIB
