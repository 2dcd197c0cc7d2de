"""Tasks that run side by side: as many as allowed, all of them, and the first failure counts."""

from __future__ import annotations

import pytest
import trio

from pbsfs.base.errors import SourceError
from pbsfs.runtime.together import run_for_each


def test_each_item_is_worked_on_once_by_so_many_at_once() -> None:
    running = peak = 0
    done: list[int] = []

    async def work(item: int) -> None:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await trio.lowlevel.checkpoint()
        running -= 1
        done.append(item)

    async def main() -> None:
        await run_for_each(range(20), work, at_once=3)
        await run_for_each([], work, at_once=3)

    trio.run(main)
    assert sorted(done) == list(range(20))
    assert peak == 3


def test_the_first_failure_ends_all() -> None:
    begun: list[int] = []

    async def work(item: int) -> None:
        begun.append(item)
        if item == 1:
            raise SourceError("broken")
        await trio.sleep_forever()

    async def main() -> None:
        with pytest.raises(SourceError, match="broken"):
            await run_for_each(range(20), work, at_once=2)

    trio.run(main)
    assert sorted(begun) in ([0, 1], [0, 1, 2])
