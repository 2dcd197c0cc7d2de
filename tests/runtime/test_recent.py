"""The last warnings and errors of the log."""

from __future__ import annotations

import logging

import pytest

from pbsfs.base.text import MAX_SHOWN
from pbsfs.runtime.recent import MOST, Recent


@pytest.fixture
def log() -> tuple[logging.Logger, Recent]:
    """A log that is not this process's."""
    logger, recent = logging.Manager(logging.RootLogger(logging.INFO)).getLogger("other"), Recent()
    logger.addHandler(recent)
    return logger, recent


def test_warnings_and_errors_are_kept_with_their_times(log: tuple[logging.Logger, Recent]) -> None:
    logger, recent = log
    logger.info("not this")
    record = logging.LogRecord("x", logging.WARNING, "", 0, "%s is away", ("pbs",), None)
    record.created = 1_700_000_000.9
    logger.handle(record)
    logger.error("and this")
    first, second = recent.text().splitlines()
    assert first == "2023-11-14T22:13:20Z WARNING pbs is away"
    assert second.endswith("Z ERROR and this")


def test_only_the_last_are_kept(log: tuple[logging.Logger, Recent]) -> None:
    logger, recent = log
    for number in range(MOST + 5):
        logger.warning("number %d", number)
    lines = recent.text().splitlines()
    assert len(lines) == MOST
    assert lines[0].endswith(" number 5")
    assert lines[-1].endswith(f" number {MOST + 4}")


def test_text_from_outside_is_one_line_of_bounded_length(log: tuple[logging.Logger, Recent]) -> None:
    logger, recent = log
    logger.warning("a\n2026-01-01T00:00:00Z ERROR made up\x1b[2J")
    logger.warning("b" * 10_000)
    first, second = recent.text().splitlines()
    assert first.endswith(r"WARNING a\n2026-01-01T00:00:00Z ERROR made up\x1b[2J")
    assert len(second) < MAX_SHOWN + 50
