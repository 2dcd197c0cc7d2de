"""The log: one line for a message, whatever is in it."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pbsfs.base.text import escaped
from pbsfs.runtime.logs import set_up_logging


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
    set_up_logging("warning", tmp_path / "log")
    logging.getLogger("pbsfs.test").error("%s", text)
    assert (tmp_path / "log").read_text(encoding="utf-8").endswith(f" ERROR {line}\n")


def test_replies_that_nobody_waits_for_are_not_logged(capfd: pytest.CaptureFixture[str]) -> None:
    set_up_logging("warning", None)
    pyfuse3 = logging.getLogger("pyfuse3")
    pyfuse3.error("fuse_release(): fuse_reply_* failed with %s", os.strerror(errno.ENOENT))
    pyfuse3.error("fuse_read(): fuse_reply_* failed with %s", os.strerror(errno.EIO))
    assert "fuse_release" not in (text := capfd.readouterr().err)
    assert "fuse_read" in text


def test_tracebacks_are_escaped_and_indented(tmp_path: Path) -> None:
    set_up_logging("warning", tmp_path / "log")
    try:
        raise ValueError("\x1b[31m\nforged: line\r\u2028end")
    except ValueError:
        logging.getLogger("pbsfs.test").exception("failed")
    first, *rest = (tmp_path / "log").read_bytes().decode().removesuffix("\n").split("\n")
    assert first.endswith(" ERROR failed")
    assert rest[-1] == "  forged: line\ufffd\ufffdend"
    assert all(line.startswith("  ") and line.isprintable() for line in rest)
