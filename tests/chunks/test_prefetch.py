"""The read-ahead policy, by itself: who gets a window, and who does not."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbsfs.chunks.limits import DEFAULT
from pbsfs.chunks.prefetch import ReadAhead

KIB = 1 << 10
MIB = 1 << 20


def observe(reads: Iterable[tuple[int, int]], ahead: ReadAhead | None = None) -> list[int]:
    """The windows that a reader gets."""
    ahead = ahead or ReadAhead()
    return [ahead.observe(offset, length) for offset, length in reads]


def in_sequence(size: int, *, start: int = 0, step: int = 128 * KIB) -> list[tuple[int, int]]:
    return [(offset, min(step, start + size - offset)) for offset in range(start, start + size, step)]


def test_the_first_read_fetches_nothing_ahead_wherever_it_is() -> None:
    for offset in (0, 4 * KIB, 10 * MIB, 1 << 50):
        assert observe([(offset, 1 * MIB)]) == [0]


def test_a_sequential_reader_gets_a_window_that_grows_to_the_largest_and_stays() -> None:
    windows = observe(in_sequence(40 * MIB))
    assert windows == sorted(windows)
    assert windows[0] == 0
    assert 0 < next(w for w in windows if w) < 2 * MIB
    assert windows[-1] == DEFAULT.max_window
    assert max(windows) == DEFAULT.max_window


def test_who_reads_all_of_it_gets_the_largest_window_from_the_start() -> None:
    assert observe(in_sequence(4 * MIB), ReadAhead(whole=True)) == [DEFAULT.max_window] * len(
        in_sequence(4 * MIB)
    )
    assert observe([(8 * MIB, 128 * KIB)], ReadAhead(whole=True)) == [0]


def test_a_window_takes_evidence() -> None:
    ahead = ReadAhead()
    ahead.observe(0, 4 * KIB)
    reads = in_sequence(DEFAULT.evidence, start=4 * KIB, step=4 * KIB)
    windows = observe(reads, ahead)
    assert windows[:-1] == [0] * (len(reads) - 1)
    assert windows[-1] == DEFAULT.growth * DEFAULT.evidence


@given(st.data())
def test_a_sequential_reader_of_any_request_sizes_gets_a_window(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, 1 << 44).map(lambda page: page * 4096))
    sizes = data.draw(st.lists(st.integers(1, 256).map(lambda pages: pages * 4096), min_size=2, max_size=12))
    ahead = ReadAhead()
    offset = start
    windows: list[int] = []
    while offset - start < 20 * MIB:
        for size in sizes:
            windows.append(ahead.observe(offset, size))
            offset += size
    assert windows[-1] == DEFAULT.max_window
    enough = DEFAULT.evidence + sizes[0]  # the first read is a jump
    read = 0
    for index, window in enumerate(windows):
        read += sizes[index % len(sizes)]
        assert (window > 0) == (read >= enough)


@given(seed=st.integers(0, 2**32), size=st.sampled_from([16 * MIB, 64 * MIB, 1 << 30, 1 << 40]))
def test_a_uniformly_random_reader_gets_none(seed: int, size: int) -> None:
    source = random.Random(seed)
    pages = size // 4096
    assert not any(observe((source.randrange(pages) * 4096, 4096) for _ in range(2000)))


@given(seed=st.integers(0, 2**32), region=st.sampled_from([256 * KIB, 512 * KIB, 1 * MIB, 2 * MIB, 4 * MIB]))
def test_a_random_reader_that_stays_in_a_small_region_gets_none(seed: int, region: int) -> None:
    source = random.Random(seed)
    pages = region // 4096
    assert not any(observe((source.randrange(pages) * 4096, 4096) for _ in range(3000)))


@pytest.mark.parametrize("size", [4 * KIB, 64 * KIB, 200 * KIB])
def test_a_tiny_image_read_over_and_over_gets_none(size: int) -> None:
    source = random.Random(size)
    reads = [(source.randrange(size // 4096) * 4096, 4096) for _ in range(2000)]
    assert not any(observe(reads))


@pytest.mark.parametrize("region", [512 * KIB, 1 * MIB, 2 * MIB])
@pytest.mark.parametrize("length", [32 * KIB, 64 * KIB, 128 * KIB])
def test_what_looks_like_a_sequence_by_chance_is_soon_forgotten(region: int, length: int) -> None:
    source = random.Random(length + region)
    places = region // length
    windows = [
        window
        for _ in range(50)
        for window in observe((source.randrange(places) * length, length) for _ in range(1000))
    ]
    assert sum(window > 0 for window in windows) < len(windows) // 200


def test_requests_that_overlap_a_little_are_a_sequence() -> None:
    assert observe([(offset, 80 * KIB) for offset in range(0, 32 * MIB, 64 * KIB)])[-1] == DEFAULT.max_window


def test_reading_the_same_place_again_and_again_is_no_sequence() -> None:
    assert not any(observe([(1 * MIB, 64 * KIB)] * 200))


def test_reading_backwards_is_no_sequence() -> None:
    assert not any(observe(reversed(in_sequence(16 * MIB))))


@pytest.mark.parametrize("step", [256 * KIB, 1 * MIB, 8 * MIB])
def test_a_reader_that_leaves_out_more_than_it_reads_gets_none(step: int) -> None:
    assert not any(observe([(offset, 64 * KIB) for offset in range(0, 64 * MIB, step)]))


@pytest.mark.parametrize("span", [2, 4, 8, 15])
def test_requests_out_of_order_as_the_kernel_sends_them_are_a_sequence(span: int) -> None:
    source = random.Random(span)
    reads = in_sequence(32 * MIB)
    shuffled: list[tuple[int, int]] = []
    for at in range(0, len(reads), span):
        part = reads[at : at + span]
        source.shuffle(part)
        shuffled += part
    windows = observe(shuffled)
    settled = windows[len(windows) // 2 :]
    assert min(settled) >= 8 * MIB


def test_two_windows_of_the_kernel_in_flight_at_once_are_a_sequence() -> None:
    first, second = in_sequence(16 * MIB)[0::2], in_sequence(16 * MIB)[1::2]
    mixed = [read for pair in zip(second, first, strict=True) for read in pair]
    assert observe(mixed)[-1] > 8 * MIB


@pytest.mark.parametrize(
    "jump", [DEFAULT.reorder_distance + 1, 1 << 40, -DEFAULT.reorder_distance - 1, -15 * MIB]
)
def test_a_jump_ends_the_window_at_once(jump: int) -> None:
    ahead = ReadAhead()
    assert observe(in_sequence(20 * MIB), ahead)[-1] == DEFAULT.max_window
    assert ahead.observe(20 * MIB + jump, 128 * KIB) == 0
    assert ahead.position == 20 * MIB + jump + 128 * KIB


def test_small_gaps_shrink_the_window_before_they_end_it() -> None:
    ahead = ReadAhead()
    before = observe(in_sequence(2 * MIB), ahead)[-1]
    after = ahead.observe(2 * MIB + 256 * KIB, 4 * KIB)
    assert 0 < after < before


def test_a_sequence_after_random_reads_is_recognised_again() -> None:
    for region in (512 * KIB, 2 * MIB, 8 * MIB, 1 << 40):
        source = random.Random(region)
        ahead = ReadAhead()
        random_reads = [(source.randrange(region // 4096) * 4096, 4096) for _ in range(3000)]
        assert not any(observe(random_reads, ahead))
        windows = observe(in_sequence(24 * MIB, start=64 * MIB), ahead)
        assert windows[-1] == DEFAULT.max_window, region
        windows = observe(in_sequence(24 * MIB), ahead)
        assert windows[-1] == DEFAULT.max_window, region


def test_a_sequence_after_many_small_gaps_is_recognised_within_a_few_requests_of_the_largest_gap() -> None:
    ahead = ReadAhead()
    assert not any(observe([(offset, 64 * KIB) for offset in range(0, 64 * MIB, 256 * KIB)], ahead))
    assert (
        observe(in_sequence(DEFAULT.reorder_distance + 2 * DEFAULT.evidence, start=64 * MIB), ahead)[-1] > 0
    )


def test_a_sequence_right_where_the_random_reads_were_is_recognised() -> None:
    source = random.Random(1)
    ahead = ReadAhead()
    assert not any(observe(((source.randrange(500) * 4096, 4096) for _ in range(500)), ahead))
    assert observe(in_sequence(16 * MIB), ahead)[-1] > 0


def test_leaving_out_a_hole_is_no_jump() -> None:
    ahead = ReadAhead()
    before = observe(in_sequence(4 * MIB), ahead)[-1]
    ahead.skip(1 << 40)
    assert ahead.position == 1 << 40
    assert ahead.observe(1 << 40, 128 * KIB) >= before


@given(
    st.lists(st.tuples(st.integers(0, 1 << 62), st.integers(0, 1 << 30)), max_size=30),
)
def test_no_reads_at_all_make_a_window_that_is_too_large_or_negative(reads: list[tuple[int, int]]) -> None:
    assert all(0 <= window <= DEFAULT.max_window for window in observe(reads))
