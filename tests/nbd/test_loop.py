"""The loop's thread: the answers that nbdkit's threads wait for."""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from pbsfs.nbd.loop import LoopThread


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    found = LoopThread(lambda: True, 0.5)
    found.start(contextlib.nullcontext(), lambda _failed: None)
    yield found
    found.stop()


class Late(concurrent.futures.Future[Any]):
    """One whose result comes at the moment at which waiting for it ends."""

    def result(self, timeout: float | None = None) -> Any:
        if timeout is None:
            return super().result()
        with contextlib.suppress(TimeoutError):
            super().result(30)
        raise TimeoutError


async def answer() -> str:
    return "read"


async def fail() -> str:
    raise TimeoutError("of the work")


def test_an_answer_that_comes_when_the_wait_ends_is_taken(
    loop: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(concurrent.futures, "Future", Late)
    assert loop.call(answer) == "read"


def test_a_time_out_of_the_work_is_raised(loop: LoopThread, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TimeoutError, match="of the work"):
        loop.call(fail)
    monkeypatch.setattr(concurrent.futures, "Future", Late)
    with pytest.raises(TimeoutError, match="of the work"):
        loop.call(fail)
