"""The log: one line for a message, whatever is in it."""

from __future__ import annotations

import errno
import json
import logging
import logging.handlers
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pbsfs.base.text import escaped
from pbsfs.runtime.logs import STARTING, LogOptions, log_failure, set_up_logging


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The handlers of the tests' own log stay."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    root.handlers = []
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers = before
    root.setLevel(level)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plain ü € ☃", "plain ü € ☃"),
        ("two\nlines", "two\\nlines"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("no\udcfftext", "no\\udcfftext"),
        ("\u202eright to left", "\\u202eright to left"),
    ],
)
def test_what_is_not_to_be_shown_is_escaped(text: str, line: str, tmp_path: Path) -> None:
    assert escaped(text) == line
    set_up_logging(LogOptions(file=tmp_path / "log"))
    logging.getLogger("pbsfs.test").error("%s", text)
    assert (tmp_path / "log").read_text(encoding="utf-8").endswith(f" ERROR {line}\n")


def test_a_file_that_takes_no_more_is_reported_once(capfd: pytest.CaptureFixture[str]) -> None:
    set_up_logging(LogOptions(file=Path("/dev/full")))
    for number in range(3):
        logging.getLogger("pbsfs.test").error("message %d", number)
    problem = "No space left on device; free some space, or name another file"
    assert capfd.readouterr().err == f"pbsfs: cannot write the log file /dev/full: {problem}\n"


def test_replies_that_nobody_waits_for_are_not_logged(capfd: pytest.CaptureFixture[str]) -> None:
    set_up_logging(LogOptions())
    pyfuse3 = logging.getLogger("pyfuse3")
    pyfuse3.error("fuse_release(): fuse_reply_* failed with %s", os.strerror(errno.ENOENT))
    pyfuse3.error("fuse_read(): fuse_reply_* failed with %s", os.strerror(errno.EIO))
    assert "fuse_release" not in (text := capfd.readouterr().err)
    assert "fuse_read" in text


def test_tracebacks_are_escaped_and_indented(tmp_path: Path) -> None:
    set_up_logging(LogOptions(file=tmp_path / "log"))
    try:
        raise ValueError("\x1b[31m\nforged: line\r\u2028end")
    except ValueError:
        logging.getLogger("pbsfs.test").exception("failed")
    first, *rest = (tmp_path / "log").read_bytes().decode().removesuffix("\n").split("\n")
    assert first.endswith(" ERROR failed")
    assert rest[-1] == "  forged: line\ufffd\ufffdend"
    assert all(line.startswith("  ") and line.isprintable() for line in rest)


def as_json(line: str) -> dict[str, Any]:
    """The object in a line, which a terminal can show."""
    assert line.endswith("\n")
    assert line[:-1].isprintable()
    found = json.loads(line)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plain ü € ☃", "plain ü € ☃"),
        ('two\nlines, "quoted" \\', 'two\nlines, "quoted" \\'),
        ("\x1b[31mred\x07\x7f\x9b", "\x1b[31mred\x07\x7f\x9b"),
        ("no\udcfftext", "no\\udcfftext"),
        ("\u202eright to left\u2028\U0001f600\U000e0001", "\u202eright to left\u2028\U0001f600\U000e0001"),
    ],
)
def test_json_has_one_object_in_a_line_whatever_the_text(text: str, message: str, tmp_path: Path) -> None:
    set_up_logging(LogOptions(file=tmp_path / "log", format="json"))
    before = datetime.now(UTC)
    logging.getLogger("pbsfs.test").error("%s", text, extra={"offset": 7, "image": text})
    found = as_json((tmp_path / "log").read_text(encoding="utf-8"))
    time = found.pop("time")
    assert time.endswith("Z")
    assert before <= datetime.fromisoformat(time) <= datetime.now(UTC)
    expected = {"level": "error", "logger": "pbsfs.test", "message": message, "offset": 7, "image": message}
    assert found == expected


def test_json_has_the_traceback_of_what_was_not_expected(tmp_path: Path) -> None:
    set_up_logging(LogOptions(file=tmp_path / "log", format="json"))
    try:
        raise ValueError("\x1b[31m\nforged")
    except ValueError:
        logging.getLogger("pbsfs.test").exception("failed")
    found = as_json((tmp_path / "log").read_text())
    assert found["message"] == "failed"
    assert found["traceback"].endswith("ValueError: \x1b[31m\nforged")


def test_fields_do_not_replace_what_each_line_has(capfd: pytest.CaptureFixture[str]) -> None:
    set_up_logging(LogOptions(format="json"))
    logging.getLogger("pbsfs.test").warning("true", extra={"level": "false", "time": 0, "place": Path("/x")})
    found = as_json(capfd.readouterr().err)
    assert (found["level"], found["message"], found["place"]) == ("warning", "true", "/x")
    assert found["time"] != 0


def test_a_failure_is_json_where_the_log_is(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    set_up_logging(LogOptions(format="json"))
    assert log_failure("no\nsuch", 3)
    found = as_json(capfd.readouterr().err)
    assert (found["level"], found["message"], found["exit_status"]) == ("error", "no\nsuch", 3)
    for options in (
        LogOptions(),
        LogOptions(format="text"),
        LogOptions(file=tmp_path / "log", format="json"),
    ):
        set_up_logging(options)
        assert not log_failure("no such", 3)
    assert capfd.readouterr().err == ""


def test_lines_for_the_user_who_starts_a_program_are_text(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    set_up_logging(LogOptions(file=tmp_path / "log", format="json"))
    STARTING.warning("no\nserver")
    assert capfd.readouterr().err == "pbsfs: WARNING: no\\nserver\n"
    assert as_json((tmp_path / "log").read_text())["message"] == "no\nserver"


def test_syslog_gets_json_after_the_name_of_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        syslog.bind(str(tmp_path / "log"))
        monkeypatch.setattr("pbsfs.runtime.logs.SYSLOG_SOCKET", tmp_path / "log")
        set_up_logging(LogOptions(format="json"), background=True)
        logging.getLogger("pbsfs.test").error("two\nlines")
        record = syslog.recv(4096).decode().rstrip("\0")
    name, _space, text = record.partition(": ")
    assert name.endswith(f"pbsfs[{os.getpid()}]")
    assert as_json(f"{text}\n")["message"] == "two\nlines"
