"""Reports are not repeated, and what is remembered for that is bounded."""

from __future__ import annotations

import logging
import time

import pytest

from pbsfs.runtime.report import DAY, HOUR, Reporter

log = logging.getLogger("pbsfs.test")


def test_reports_are_remembered_up_to_a_limit(caplog: pytest.LogCaptureFixture) -> None:
    reporter = Reporter(log, repeat_after=DAY, most=10)
    for number in range(15):
        reporter.report(f"damage {number}")
    assert len(reporter) == 10
    assert len(caplog.records) == 15
    caplog.clear()
    reporter.report("damage 10")
    assert not caplog.records
    reporter.report("damage 0")  # long forgotten
    assert len(caplog.records) == 1
    caplog.clear()


def test_a_report_is_repeated_after_its_time(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 5.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    reporter = Reporter(log, repeat_after=HOUR)
    reporter.report("damage")
    now += HOUR - 1
    reporter.report("damage")
    assert len(caplog.records) == 1
    now += 2
    reporter.report("damage", logging.ERROR)
    assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.ERROR]
    caplog.clear()


def test_a_text_is_not_a_format(caplog: pytest.LogCaptureFixture) -> None:
    Reporter(log, repeat_after=HOUR).report("100 %s of it")
    assert caplog.messages == ["100 %s of it"]
    caplog.clear()
