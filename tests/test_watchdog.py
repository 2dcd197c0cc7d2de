"""What a test started is ended when it takes too long, and what many tests share is not."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from tests.support.watchdog import start_again, watched


class Timer:
    """A timer whose time passes when a test says so."""

    made: list[Timer]

    def __init__(self, interval: float, function: Callable[[], None]) -> None:
        self.interval = interval
        self.daemon = False
        self._function = function
        self._runs = False
        self.made.append(self)

    def start(self) -> None:
        self._runs = True

    def cancel(self) -> None:
        self._runs = False

    def pass_by(self) -> None:
        if self._runs:
            self._function()


@pytest.fixture
def timers(monkeypatch: pytest.MonkeyPatch) -> list[Timer]:
    Timer.made = []
    monkeypatch.setattr(threading, "Timer", Timer)
    return Timer.made


def test_what_takes_too_long_is_ended(timers: list[Timer]) -> None:
    ended: list[str] = []
    with watched(7, lambda: ended.append("first")):
        (first,) = timers
        assert first.interval == 7
        assert first.daemon
        first.pass_by()
        assert ended == ["first"]
    first.pass_by()
    assert ended == ["first"]


def test_a_test_that_starts_gives_what_is_shared_its_time_again(timers: list[Timer]) -> None:
    ended: list[str] = []
    with watched(7, lambda: ended.append("shared")):
        start_again()
        first, second = timers
        first.pass_by()
        assert not ended
        second.pass_by()
        assert ended == ["shared"]
    start_again()
    assert len(timers) == 2
