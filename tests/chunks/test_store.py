"""The chunk store: one fetch per chunk, failures, cancellation, and the bound on bytes in flight."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from pbsfs.base.errors import DamageError, PbsfsError, SourceError
from pbsfs.base.names import Archive
from pbsfs.chunks.budget import Budget
from pbsfs.chunks.limits import DEFAULT, FetchLimits
from pbsfs.chunks.store import Chunk, ChunkStore
from pbsfs.formats.manifest import CryptMode
from pbsfs.runtime.memory import Memory
from pbsfs.sources.rate import Rate
from tests.support import made
from tests.support.run import in_trio, until
from tests.support.sources import CHUNK_SIZE, MemorySource, file_of

ARCHIVE = Archive("disk.img.fidx")
SNAPSHOT = made.snapshot()


def source_of(chunks: int) -> tuple[MemorySource, list[Chunk], list[bytes]]:
    """A source with one image of `chunks` chunks that differ; the chunks, and their content."""
    source = MemorySource()
    content = made.image(1, "r" * chunks)
    source.add(SNAPSHOT, {ARCHIVE.filename: content})
    pieces = [content[i : i + CHUNK_SIZE] for i in range(0, len(content), CHUNK_SIZE)]
    digests = [source.add_chunk(piece) for piece in pieces]
    return source, [chunk(digest) for digest in digests], pieces


def chunk(digest: bytes, length: int = CHUNK_SIZE) -> Chunk:
    return Chunk(SNAPSHOT, ARCHIVE, digest, length, encrypted=False, key=None)


@asynccontextmanager
async def opened(
    source: MemorySource, cache_size: int = 64 << 20, limits: FetchLimits = DEFAULT
) -> AsyncIterator[ChunkStore]:
    async with trio.open_nursery() as nursery:
        yield ChunkStore(source, nursery, Memory(cache_size), limits)
        nursery.cancel_scope.cancel()


async def get(store: ChunkStore, chunk: Chunk) -> bytes:
    cached = store.peek(chunk.digest, chunk.key)
    return await store.request(chunk).wait() if cached is None else cached


async def failure(store: ChunkStore, chunk: Chunk) -> PbsfsError:
    with pytest.raises(PbsfsError) as caught:
        await get(store, chunk)
    return caught.value


SMALL_BUDGET = 4 * CHUNK_SIZE
SMALL = FetchLimits(fetch_budget=SMALL_BUDGET)
"""Lets four chunks be fetched at once."""


# --- single fetch


@in_trio
async def test_all_who_want_a_chunk_share_one_fetch() -> None:
    source, (wanted,), (content,) = source_of(1)
    gate = source.hold("fetch_chunk")
    got: list[bytes] = []

    async def read() -> None:
        got.append(await get(store, wanted))

    async with opened(source) as store, trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(read)
        await wait_all_tasks_blocked()
        assert source.in_flight == 1
        gate.set()
    assert got == [content] * 20
    assert source.calls["fetch_chunk"] == 1


@in_trio
async def test_a_chunk_that_was_fetched_is_at_hand_from_then_on() -> None:
    source, (wanted,), (content,) = source_of(1)
    async with opened(source) as store:
        assert store.peek(wanted.digest, None) is None
        await get(store, wanted)
        assert store.peek(wanted.digest, None) == content
        await get(store, wanted)
    assert source.calls["fetch_chunk"] == 1


@in_trio
async def test_chunks_that_differ_fly_side_by_side() -> None:
    source, chunks, contents = source_of(5)
    gate = source.hold("fetch_chunk")
    async with opened(source) as store:
        fetches = [store.request(wanted) for wanted in chunks]
        await wait_all_tasks_blocked()
        assert source.in_flight == 5
        gate.set()
        assert [await fetch.wait() for fetch in fetches] == contents


# --- failure


@in_trio
async def test_a_failed_fetch_fails_all_who_wait_and_the_next_read_tries_again() -> None:
    source, (wanted,), (content,) = source_of(1)
    source.fail("fetch_chunk", SourceError("the disk is gone"))
    gate = source.hold("fetch_chunk")
    errors: list[str] = []

    async def read() -> None:
        errors.append(str(await failure(store, wanted)))

    async with opened(source) as store:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(read)
            await wait_all_tasks_blocked()
            gate.set()
        assert errors == ["the disk is gone"] * 3
        assert source.calls["fetch_chunk"] == 1
        assert await get(store, wanted) == content
    assert source.calls["fetch_chunk"] == 2


@in_trio
async def test_a_failure_does_not_touch_other_chunks() -> None:
    source, chunks, contents = source_of(3)
    source.damage(chunks[1].digest, 700)
    async with opened(source) as store:
        fetches = [store.request(wanted) for wanted in chunks]
        assert await fetches[0].wait() == contents[0]
        with pytest.raises(DamageError):
            await fetches[1].wait()
        assert await fetches[2].wait() == contents[2]


@in_trio
async def test_damaged_bytes_are_never_kept_and_the_error_names_the_chunk() -> None:
    source, (wanted,), (content,) = source_of(1)
    whole = source.chunks[wanted.digest]
    for bit in (0, 70, 100, 5000, len(whole) * 8 - 1):
        source.damage(wanted.digest, bit)
        async with opened(source) as store:
            error = await failure(store, wanted)
            assert isinstance(error, DamageError)
            assert wanted.digest.hex() in str(error)
            assert store.peek(wanted.digest, None) is None
            source.chunks[wanted.digest] = whole
            assert await get(store, wanted) == content


@in_trio
async def test_another_chunk_in_its_place_is_damage() -> None:
    source, (wanted, other), _contents = source_of(2)
    source.chunks[wanted.digest] = source.chunks[other.digest]
    async with opened(source) as store:
        error = await failure(store, wanted)
    assert isinstance(error, DamageError)
    assert "digest mismatch" in str(error)


@in_trio
async def test_what_fails_unexpectedly_becomes_a_source_error_and_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    source, (wanted,), (content,) = source_of(1)
    source.fail("fetch_chunk", ZeroDivisionError("oops"))
    async with opened(source) as store:
        error = await failure(store, wanted)
        assert isinstance(error, SourceError)
        assert wanted.digest.hex() in str(error)
        assert "ZeroDivisionError: oops" in str(error)
        (record,) = caplog.records
        assert record.levelno == logging.ERROR
        assert record.exc_info is not None
        caplog.clear()
        assert await get(store, wanted) == content


@in_trio
async def test_a_lack_of_memory_is_a_fault_that_may_pass() -> None:
    source, (wanted,), (content,) = source_of(1)
    source.fail("fetch_chunk", MemoryError())
    async with opened(source) as store:
        error = await failure(store, wanted)
        assert isinstance(error, SourceError)
        assert error.retryable
        assert "no memory" in str(error)
        assert await get(store, wanted) == content


@in_trio
async def test_an_index_that_lies_about_a_length_fails_only_its_own_reads() -> None:
    source, (honest,), (content,) = source_of(1)
    gate = source.hold("fetch_chunk")
    for lie in (CHUNK_SIZE // 2, CHUNK_SIZE * 2):
        liar = chunk(honest.digest, lie)
        async with opened(source) as store:
            wrong, right = store.request(liar), store.request(honest)
            await wait_all_tasks_blocked()
            gate.set()
            with pytest.raises(DamageError):
                await wrong.wait()
            assert await right.wait() == content


@in_trio
async def test_plain_data_that_is_cached_does_not_answer_for_an_encrypted_archive() -> None:
    source = MemorySource()
    source.add(SNAPSHOT, {ARCHIVE.filename: b"plain"})
    plain = chunk(source.add_chunk(b"plain"), 5)
    sealed = Chunk(SNAPSHOT, ARCHIVE, plain.digest, 5, encrypted=True, key=made.KEY)
    async with opened(source) as store:
        assert await get(store, plain) == b"plain"
        assert store.peek(plain.digest, made.KEY) is None
        assert "not encrypted" in str(await failure(store, sealed))
        store.prefetch(sealed)
        await wait_all_tasks_blocked()
        assert source.calls["fetch_chunk"] == 3


@in_trio
async def test_decrypted_data_that_is_cached_does_not_answer_for_a_plain_archive() -> None:
    source = MemorySource()
    info = source.add(SNAPSHOT, {ARCHIVE.filename: b"secret"}, crypt_mode=CryptMode.ENCRYPT, key=made.KEY)
    assert file_of(info, ARCHIVE.filename).size == 6
    sealed = Chunk(SNAPSHOT, ARCHIVE, made.KEY.digest(b"secret"), 6, encrypted=True, key=made.KEY)
    async with opened(source) as store:
        assert await get(store, sealed) == b"secret"
        assert "is encrypted" in str(await failure(store, chunk(sealed.digest, 6)))


# --- cancellation


@in_trio
async def test_who_gives_up_does_not_take_the_chunk_from_the_others() -> None:
    source, (wanted,), (content,) = source_of(1)
    gate = source.hold("fetch_chunk")
    got: list[bytes] = []

    async def read(scope: trio.CancelScope) -> None:
        with scope:
            got.append(await get(store, wanted))

    impatient, patient = trio.CancelScope(), trio.CancelScope()
    async with opened(source) as store, trio.open_nursery() as nursery:
        nursery.start_soon(read, impatient)
        await wait_all_tasks_blocked()
        nursery.start_soon(read, patient)
        await wait_all_tasks_blocked()
        impatient.cancel()
        await wait_all_tasks_blocked()
        assert impatient.cancelled_caught
        assert source.in_flight == 1
        gate.set()
    assert got == [content]
    assert source.calls["fetch_chunk"] == 1


@in_trio
async def test_a_chunk_that_nobody_waits_for_any_more_is_kept_when_it_comes() -> None:
    source, (wanted,), (content,) = source_of(1)
    gate = source.hold("fetch_chunk")
    async with opened(source) as store:
        with trio.move_on_after(1):
            await get(store, wanted)
        gate.set()
        fetch = store.request(wanted)
        assert await fetch.wait() == content
        assert store.peek(wanted.digest, None) == content
    assert source.calls["fetch_chunk"] == 1


@in_trio
async def test_closing_fails_those_who_still_wait() -> None:
    source, chunks, _contents = source_of(3)
    source.hold("fetch_chunk")
    errors: list[str] = []

    async def read(wanted: Chunk) -> None:
        errors.append(str(await failure(store, wanted)))

    async with trio.open_nursery() as readers, opened(source) as store:
        for wanted in chunks:
            readers.start_soon(read, wanted)
        await wait_all_tasks_blocked()
        assert source.in_flight == 3
    assert errors == ["reading ends: the source is being closed"] * 3
    assert source.in_flight == 0


@in_trio
async def test_a_request_after_closing_is_refused_and_nobody_hangs() -> None:
    source, (wanted,), _contents = source_of(1)
    async with opened(source) as store:
        pass
    for _ in range(2):
        with pytest.raises(RuntimeError, match="closed"):
            store.request(wanted)
        with pytest.raises(RuntimeError, match="closed"):
            store.prefetch(wanted)


# --- the bytes in flight


@in_trio
async def test_bytes_in_flight_never_exceed_the_budget() -> None:
    source, chunks, contents = source_of(11)
    gates = [source.hold(wanted.digest) for wanted in chunks]
    async with opened(source, limits=SMALL) as store:
        fetches = [store.request(wanted) for wanted in chunks]
        for gate, fetch, content in zip(gates, fetches, contents, strict=True):
            await wait_all_tasks_blocked()
            assert source.in_flight * CHUNK_SIZE <= SMALL_BUDGET
            gate.set()
            assert await fetch.wait() == content
    assert source.peak == 4
    assert source.fetched == [wanted.digest for wanted in chunks]  # first come, first served


@in_trio
async def test_what_is_read_on_demand_takes_off_before_what_is_fetched_ahead_behind_it() -> None:
    for _ in range(20):  # trio runs new tasks in an order of its own
        source, chunks, _contents = source_of(6)
        source.hold("fetch_chunk")
        async with opened(source) as store:
            store.request(chunks[0])
            for wanted in chunks[1:]:
                store.prefetch(wanted)
            await wait_all_tasks_blocked()
            assert source.fetched == [wanted.digest for wanted in chunks]


class Taker:
    """Takes from a budget, until told to give it back."""

    def __init__(self, amount: int) -> None:
        self.amount = amount
        self.has = False
        self.enough = trio.Event()
        self.scope = trio.CancelScope()

    async def run(self, budget: Budget) -> None:
        with self.scope:
            async with budget.take(self.amount):
                self.has = True
                try:
                    await self.enough.wait()
                finally:
                    self.has = False


@asynccontextmanager
async def takers(capacity: int, *amounts: int) -> AsyncIterator[tuple[Budget, list[Taker]]]:
    budget = Budget(capacity)
    made_takers = [Taker(amount) for amount in amounts]
    async with trio.open_nursery() as nursery:
        for taker in made_takers:
            nursery.start_soon(taker.run, budget)
            await wait_all_tasks_blocked()
        yield budget, made_takers
        nursery.cancel_scope.cancel()


def who_has(all_takers: list[Taker]) -> list[int]:
    return [number for number, taker in enumerate(all_takers) if taker.has]


@in_trio
async def test_what_is_larger_than_the_budget_goes_alone() -> None:
    async with takers(10, 4, 25, 4) as (budget, (first, large, last)):
        assert [first.has, large.has, last.has] == [True, False, False]
        first.enough.set()
        await wait_all_tasks_blocked()
        assert [first.has, large.has, last.has] == [False, True, False]
        assert budget.taken == 25
        large.enough.set()
        await wait_all_tasks_blocked()
        assert [first.has, large.has, last.has] == [False, False, True]
        assert budget.taken == 4


@in_trio
async def test_a_small_one_does_not_overtake_a_large_one() -> None:
    async with takers(10, 6, 6, 2) as (_budget, all_takers):
        assert who_has(all_takers) == [0]
        all_takers[0].enough.set()
        await wait_all_tasks_blocked()
        assert who_has(all_takers) == [1, 2]


@in_trio
async def test_who_is_cancelled_in_the_queue_leaves_it_and_lets_those_behind_go() -> None:
    async with takers(10, 6, 6, 2) as (budget, all_takers):
        all_takers[1].scope.cancel()
        await wait_all_tasks_blocked()
        assert who_has(all_takers) == [0, 2]
        assert budget.taken == 8
        all_takers[0].enough.set()
        all_takers[2].enough.set()
        await wait_all_tasks_blocked()
        assert budget.taken == 0


@in_trio
async def test_who_is_cancelled_at_the_moment_of_its_turn_gives_it_on() -> None:
    async with takers(10, 10, 10, 10) as (budget, all_takers):
        all_takers[0].scope.cancel()
        all_takers[1].scope.cancel()
        await wait_all_tasks_blocked()
        assert who_has(all_takers) == [2]
        assert budget.taken == 10


@in_trio
async def test_a_failed_fetch_gives_its_bytes_back() -> None:
    source, chunks, contents = source_of(9)
    source.fail("fetch_chunk", *[SourceError("no")] * 8)
    async with opened(source, limits=SMALL) as store:
        fetches = [store.request(wanted) for wanted in chunks[:8]]
        for fetch in fetches:
            with pytest.raises(SourceError):
                await fetch.wait()
        assert await get(store, chunks[8]) == contents[8]
    assert source.peak == SMALL_BUDGET // CHUNK_SIZE


# --- prefetch


@in_trio
async def test_prefetching_brings_a_chunk_into_the_cache_once() -> None:
    source, (wanted,), (content,) = source_of(1)
    gate = source.hold("fetch_chunk")
    async with opened(source) as store:
        assert store.prefetch(wanted)
        await wait_all_tasks_blocked()
        assert store.prefetch(wanted)
        fetch = store.request(wanted)
        gate.set()
        assert await fetch.wait() == content
        assert store.prefetch(wanted)
        await wait_all_tasks_blocked()
    assert source.calls["fetch_chunk"] == 1


@in_trio
async def test_prefetching_fills_its_share_of_the_budget_and_leaves_the_rest_to_reads() -> None:
    source, chunks, contents = source_of(6)
    gate = source.hold("fetch_chunk")
    async with opened(source, limits=SMALL) as store:
        assert [store.prefetch(wanted) for wanted in chunks[:4]] == [True, True, False, False]
        fetches = [store.request(wanted) for wanted in chunks[4:]]
        await wait_all_tasks_blocked()
        assert source.in_flight * CHUNK_SIZE == SMALL_BUDGET
        gate.set()
        assert [await fetch.wait() for fetch in fetches] == contents[4:]
        for wanted, content in zip(chunks[:2], contents[:2], strict=True):
            assert await get(store, wanted) == content
        assert [store.prefetch(wanted) for wanted in chunks[2:4]] == [True, True]


@in_trio
async def test_prefetching_fills_no_more_than_half_of_a_small_cache() -> None:
    source, chunks, _contents = source_of(6)
    source.hold("fetch_chunk")
    async with opened(source, cache_size=4 * CHUNK_SIZE) as store:
        assert [store.prefetch(wanted) for wanted in chunks].count(True) == 2


@in_trio
async def test_a_copy_in_order_fills_most_of_the_cache_ahead_and_loses_nothing_before_it_is_read() -> None:
    source, chunks, contents = source_of(12)
    order = [0, 1, 2, 3, 4, 1, 5, 5, 6, 7, 8, 9, 10, 11]  # two occur again
    async with opened(source, cache_size=5 * CHUNK_SIZE) as store:
        store.serve_copy(1, in_order=True)
        assert store.window_limit == 4 * CHUNK_SIZE
        for place, number in enumerate(order):
            for wanted in (chunks[ahead] for ahead in order[place + 3 if place else 0 : place + 4]):
                assert store.prefetch(wanted)
                await until(lambda wanted=wanted: wanted.identity in store.cache)  # type: ignore[misc]
            assert store.peek(chunks[number].digest, None) == contents[number]
        assert source.calls["fetch_chunk"] == 12


@in_trio
async def test_in_a_copy_a_chunk_that_somebody_waits_for_is_read() -> None:
    source, chunks, contents = source_of(4)
    async with opened(source, cache_size=5 * CHUNK_SIZE) as store:
        store.serve_copy(1, in_order=True)
        assert [await get(store, wanted) for wanted in chunks] == contents
        assert [wanted.identity in store.cache for wanted in chunks] == [False, False, False, True]


@in_trio
async def test_what_the_cache_could_not_keep_is_not_prefetched() -> None:
    source, (wanted,), (content,) = source_of(1)
    async with opened(source, cache_size=CHUNK_SIZE - 1) as store:
        assert not store.prefetch(wanted)
        await wait_all_tasks_blocked()
        assert source.calls["fetch_chunk"] == 0
        assert await get(store, wanted) == content


@in_trio
async def test_a_prefetch_that_fails_bothers_nobody_and_makes_room_again() -> None:
    source, chunks, contents = source_of(3)
    source.fail("fetch_chunk", SourceError("no"), SourceError("no"))
    async with opened(source, cache_size=4 * CHUNK_SIZE) as store:
        assert [store.prefetch(wanted) for wanted in chunks] == [True, True, False]
        await wait_all_tasks_blocked()
        assert store.prefetch(chunks[2])
        assert [await get(store, wanted) for wanted in chunks] == contents


# --- a limited rate


@in_trio
async def test_what_is_read_comes_before_what_is_prefetched_also_if_the_read_comes_later() -> None:
    source, chunks, contents = source_of(6)
    source.rate = Rate(CHUNK_SIZE // 10)
    async with opened(source) as store, trio.open_nursery() as nursery:
        nursery.start_soon(source.rate.run)
        assert await get(store, chunks[0]) == contents[0]
        for wanted in chunks[1:5]:
            assert store.prefetch(wanted)
        await wait_all_tasks_blocked(0.001)
        async with trio.open_nursery() as reads:
            for wanted in (chunks[5], chunks[3]):
                reads.start_soon(get, store, wanted)
        for wanted in chunks[1:5]:
            await get(store, wanted)
        nursery.cancel_scope.cancel()
    order = [source.fetched.index(wanted.digest) for wanted in chunks]
    assert sorted(order) == list(range(6))
    assert order[0] == 0
    assert {order[5], order[3]} == {1, 2}


@in_trio
async def test_with_a_rate_no_more_is_fetched_ahead_than_it_brings_soon() -> None:
    source, _chunks, _contents = source_of(1)
    async with opened(source) as store:
        assert store.window_limit == 32 << 20
        source.rate = Rate(1 << 20)
        assert store.window_limit == DEFAULT.rate_window << 20
