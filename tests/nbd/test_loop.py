"""The loop's thread: the answers that nbdkit's threads wait for."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import trio

from pbsfs.nbd.loop import LoopThread, StoppedError


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


def test_work_of_several_tasks_ends_with_the_loop() -> None:
    loop = LoopThread(lambda: True, 0.01)
    loop.start(contextlib.nullcontext(), lambda _failed: None)
    begun = threading.Event()
    ends: list[str] = []

    async def work() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            begun.set()
            await trio.sleep_forever()

    def wait() -> None:
        try:
            loop.call(work)
        except StoppedError as error:
            ends.append(str(error))

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    begun.wait()
    loop.stop()
    thread.join(10)
    assert ends == ["the server is shutting down"]
