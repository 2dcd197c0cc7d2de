"""The calls that have the kernel drop what it keeps."""

from __future__ import annotations

import pytest
import trio

from pbsfs.fuse.notices import PAUSE, Notices
from tests.support.run import in_trio


@in_trio
async def test_a_call_for_which_there_is_no_thread_is_made_later(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real, refusals = trio.to_thread.run_sync, 3

    async def refuse_some(*arguments: object, **options: object) -> object:
        nonlocal refusals
        refusals -= 1
        if refusals >= 0:
            raise RuntimeError("can't start new thread")
        return await real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(trio.to_thread, "run_sync", refuse_some)
    began = trio.current_time()
    await Notices().send(made.append, 7)
    assert made == [7]
    assert trio.current_time() - began == 3 * PAUSE
