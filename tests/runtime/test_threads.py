"""The threads that decode: results, errors, order, cancellation, and how often they wake the loop up."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

import pbsfs
from pbsfs.base.errors import SourceError
from pbsfs.runtime.threads import Threads, in_thread, start
from tests.support.run import in_trio, until


class Gate:
    """Work that waits in its thread until the gate is open."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self.inside = 0
        self.most = 0
        self._lock = threading.Lock()

    def open(self) -> None:
        self._open.set()

    def work(self) -> str:
        with self._lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        assert self._open.wait(30)
        with self._lock:
            self.inside -= 1
        return "done"


@in_trio
async def test_each_gets_its_own_result_or_error() -> None:
    threads = Threads(3)
    got: dict[int, object] = {}

    def work(number: int) -> int:
        if number % 3 == 0:
            raise ValueError(f"number {number}")
        return number * number

    async def one(number: int) -> None:
        try:
            got[number] = await threads.run(lambda: work(number))
        except ValueError as error:
            got[number] = str(error)

    async with trio.open_nursery() as nursery:
        for number in range(100):
            nursery.start_soon(one, number)
    assert got == {n: f"number {n}" if n % 3 == 0 else n * n for n in range(100)}


@in_trio
async def test_no_more_threads_work_than_allowed_and_in_the_order_of_the_work() -> None:
    threads, gate = Threads(2), Gate()
    began: list[int] = []

    def later(number: int) -> None:
        began.append(number)

    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(threads.run, gate.work)
        await until(lambda: gate.inside == 2)
        for number in range(5):
            nursery.start_soon(threads.run, partial(later, number))
            await wait_all_tasks_blocked()
        assert began == []
        gate.open()
    assert gate.most == 2
    assert sorted(began) == list(range(5))
    single = Threads(1)
    began.clear()
    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(single.run, partial(later, number))
            await trio.lowlevel.checkpoint()
            await wait_all_tasks_blocked()
    assert began == list(range(20))


@in_trio
async def test_a_task_that_gives_up_does_not_wait_and_the_others_get_theirs() -> None:
    threads, gate = Threads(1), Gate()
    begun: list[str] = []
    got: list[str] = []

    async def patient() -> None:
        got.append(await threads.run(lambda: "mine"))

    async with trio.open_nursery() as others:
        async with trio.open_nursery() as impatient:
            impatient.start_soon(threads.run, gate.work)
            await until(lambda: gate.inside == 1)
            impatient.start_soon(threads.run, lambda: begun.append("work that nobody waits for"))
            await wait_all_tasks_blocked()
            others.start_soon(patient)
            await wait_all_tasks_blocked()
            impatient.cancel_scope.cancel()
        assert gate.inside == 1  # the thread works on
        gate.open()
    assert got == ["mine"]
    assert begun == []


@in_trio
async def test_a_result_is_held_by_no_thread_that_waits() -> None:
    class Content:
        pass

    threads = Threads(2)
    content = await threads.run(Content)
    held = weakref.ref(content)
    del content
    gc.collect()
    await until(lambda: held() is None)


@in_trio
async def test_several_results_wake_the_loop_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = Threads(4)
    calls = 0
    token = trio.lowlevel.current_trio_token()

    class Counted:
        def run_sync_soon(self, work: Callable[[], object]) -> None:
            nonlocal calls
            calls += 1
            token.run_sync_soon(work)

    monkeypatch.setattr(trio.lowlevel, "current_trio_token", Counted)
    gate = Gate()
    ended: list[int] = []
    all_ended = threading.Event()

    def work(number: int) -> None:
        gate.work()
        ended.append(number)
        if len(ended) == 20:
            all_ended.set()

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(threads.run, partial(work, number))
        await until(lambda: gate.inside == 4)
        await wait_all_tasks_blocked()
        gate.open()
        assert all_ended.wait(30)  # the loop is busy until all of it has ended
    assert sorted(ended) == list(range(20))
    assert calls <= 2  # the last thread may not have told yet


@in_trio
async def test_without_more_threads_of_the_system_the_error_is_raised_and_the_next_work_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads = Threads(2)

    def refuse(*_arguments: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(trio.lowlevel, "start_thread_soon", refuse)
        with pytest.raises(SourceError, match="new thread; end other programs") as raised:
            await threads.run(lambda: "lost")
        assert raised.value.retryable
    assert await threads.run(lambda: "done") == "done"


@in_trio
async def test_with_one_thread_and_no_more_of_them_that_one_does_all_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads, gate = Threads(2), Gate()
    got: list[str] = []

    async def one() -> None:
        got.append(await threads.run(lambda: "done"))

    def refuse(*_arguments: object) -> None:
        raise RuntimeError("can't start new thread")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(threads.run, gate.work)
        await until(lambda: gate.inside == 1)
        monkeypatch.setattr(trio.lowlevel, "start_thread_soon", refuse)
        nursery.start_soon(one)
        await wait_all_tasks_blocked()
        gate.open()
    assert got == ["done"]


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
@in_trio
async def test_work_that_the_last_thread_did_while_no_other_could_start_has_its_result(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    threads, start = Threads(2), trio.lowlevel.start_thread_soon
    gate, ended = Gate(), threading.Event()
    got: list[str] = []

    def start_noting_the_end(work: Callable[[], object], *arguments: Any) -> None:
        def noted() -> None:
            work()
            ended.set()

        start(noted, *arguments)

    def refuse(*_arguments: object) -> None:
        gate.open()
        assert ended.wait(30)
        raise error

    async with trio.open_nursery() as nursery:
        monkeypatch.setattr(trio.lowlevel, "start_thread_soon", start_noting_the_end)
        nursery.start_soon(threads.run, gate.work)
        await until(lambda: gate.inside == 1)
        monkeypatch.setattr(trio.lowlevel, "start_thread_soon", refuse)
        got.append(await threads.run(lambda: "done by the one that ended"))
    monkeypatch.undo()
    assert got == ["done by the one that ended"]
    assert await threads.run(lambda: "next") == "next"


@in_trio
async def test_a_lack_of_memory_for_a_thread_leaves_its_place_to_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads = Threads(1)

    def refuse(*_arguments: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(trio.lowlevel, "start_thread_soon", refuse)
        with pytest.raises(MemoryError):
            await threads.run(lambda: "lost")
    got: list[str] = []

    async def one() -> None:
        got.append(await threads.run(lambda: "done"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one)
        await until(lambda: got == ["done"])


@in_trio
async def test_threads_come_one_after_the_other_and_all_that_are_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads, gate, start = Threads(4), Gate(), trio.lowlevel.start_thread_soon
    coming: list[tuple[Any, ...]] = []
    async with trio.open_nursery() as nursery:
        with monkeypatch.context() as patch:
            patch.setattr(trio.lowlevel, "start_thread_soon", lambda *arguments: coming.append(arguments))
            for _ in range(6):
                nursery.start_soon(threads.run, gate.work)
            await wait_all_tasks_blocked()
        assert len(coming) == 1
        start(*coming[0])
        await until(lambda: gate.inside == 4)
        gate.open()
    assert gate.most == 4


@in_trio
async def test_a_thread_that_cannot_call_another_does_all_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, start = Threads(3), trio.lowlevel.start_thread_soon
    starts: list[Callable[[], object]] = []
    got: list[int] = []

    def start_one(work: Callable[[], object], deliver: Callable[..., object]) -> None:
        starts.append(work)
        if len(starts) > 1:
            raise RuntimeError("can't start new thread")
        start(work, deliver)

    async def one(number: int) -> None:
        got.append(await threads.run(lambda: number))

    with monkeypatch.context() as patch:
        patch.setattr(trio.lowlevel, "start_thread_soon", start_one)
        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(one, number)
    assert sorted(got) == [0, 1, 2]
    assert len(starts) > 1
    gate = Gate()
    async with trio.open_nursery() as nursery:  # those that could not come have left no place taken
        for _ in range(3):
            nursery.start_soon(threads.run, gate.work)
        await until(lambda: gate.inside == 3)
        gate.open()


# --- two at once


class Pairs:
    """What does two pieces of work at once, and notes their names. `fails`: those that it can't do."""

    def __init__(self, fails: str = "") -> None:
        self.seen: list[str] = []
        self._fails = fails

    def __call__(self, first: Named, second: Named) -> tuple[str | None, str | None]:
        self.seen.append(first.name + second.name)
        if "!" in self._fails:
            raise MemoryError
        one, other = (
            None if work.name in self._fails else f"{work.name} together" for work in (first, second)
        )
        return one, other


class Named:
    """Work that returns its name, or raises it where that is a digit."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self) -> str:
        if self.name.isdigit():
            raise ValueError(self.name)
        return f"{self.name} alone"


async def behind_a_busy_thread(pairs: Pairs, names: str, cancelled: str = "") -> dict[str, str]:
    """The results of works of these names, which wait for the only thread."""
    threads, gate = Threads(1, pairs), Gate()
    got: dict[str, str] = {}

    async def one(name: str) -> None:
        try:
            got[name] = await threads.run(Named(name))
        except ValueError as error:
            got[name] = f"error {error}"

    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as impatient:
            nursery.start_soon(threads.run, gate.work)
            await until(lambda: gate.inside == 1)
            for name in names:
                (impatient if name in cancelled else nursery).start_soon(one, name)
                await wait_all_tasks_blocked()
            impatient.cancel_scope.cancel()
        gate.open()
    return got


@in_trio
async def test_two_that_wait_are_done_together() -> None:
    pairs = Pairs()
    got = await behind_a_busy_thread(pairs, "abcde")
    assert pairs.seen == ["ab", "cd"]
    assert got == {name: f"{name} {'alone' if name == 'e' else 'together'}" for name in "abcde"}


@in_trio
async def test_what_cannot_be_done_together_is_done_alone_with_its_own_error() -> None:
    pairs = Pairs(fails="a2")
    assert await behind_a_busy_thread(pairs, "a1b2") == {
        "a": "a alone",
        "1": "1 together",
        "b": "b together",
        "2": "error 2",
    }
    assert await behind_a_busy_thread(Pairs(fails="!"), "a1") == {"a": "a alone", "1": "error 1"}


@in_trio
async def test_what_nobody_waits_for_is_not_half_of_a_pair() -> None:
    pairs = Pairs()
    assert set(await behind_a_busy_thread(pairs, "abcd", cancelled="bc")) == {"a", "d"}
    assert pairs.seen == ["ad"]


@in_trio
async def test_work_that_a_free_thread_comes_for_is_not_paired() -> None:
    pairs = Pairs()
    threads, gate = Threads(3, pairs), Gate()
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(threads.run, gate.work)
        await until(lambda: gate.inside == 3)
        gate.open()
    assert pairs.seen == []


# --- single pieces of work


def refuse_threads(*_arguments: object, **_options: object) -> None:
    raise RuntimeError("can't start new thread")


@in_trio
async def test_without_a_thread_for_a_piece_of_work_the_error_says_what_to_do_and_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limiter = trio.CapacityLimiter(1)
    with monkeypatch.context() as patch:
        patch.setattr(trio.to_thread, "run_sync", refuse_threads)
        with pytest.raises(
            SourceError, match=r"new thread; end other .* \(ulimit -u, TasksMax=\)$"
        ) as raised:
            await in_thread(sum, [1, 2], limiter=limiter)
    assert raised.value.retryable
    assert await in_thread(sum, [1, 2], limiter=limiter) == 3


@in_trio
async def test_what_work_in_a_thread_raises_stays_what_it_is() -> None:
    def fail(text: str) -> None:
        raise RuntimeError(text)

    with pytest.raises(RuntimeError, match=r"^an error of its own$"):
        await in_thread(fail, "an error of its own")


def test_a_thread_that_cannot_start_is_an_error_of_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.Thread, "start", refuse_threads)
    with pytest.raises(SourceError, match="new thread; end other"):
        start(threading.Thread())


def test_no_other_module_has_work_done_in_threads_of_trio() -> None:
    package = Path(pbsfs.__file__).parent
    users = [path for path in package.rglob("*.py") if "to_thread.run_sync" in path.read_text()]
    assert users == [package / "runtime" / "threads.py"]
