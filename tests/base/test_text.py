"""Text from outside, made fit to be shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbsfs.base.text import MAX_SHOWN, escaped, excerpt, first_of, one_line, printable, quoted, size_text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ünïcode", "plain ünïcode"),
        ("\x1b[31mred\x1b[0m", "\ufffd[31mred\ufffd[0m"),
        ("right\u202eleft", "right\ufffdleft"),
        ("bytes \udcff", "bytes \ufffd"),
        ("two\nlines", "two\ufffdlines"),
    ],
)
def test_what_a_terminal_would_obey_is_replaced(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (10 * 1024 - 1, "10 KiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (20 << 30, "20 GiB"),
        ((1 << 64) - 1, "16 EiB"),
        (1 << 80, "1048576 EiB"),
    ],
)
def test_sizes_have_the_unit_that_fits(size: int, text: str) -> None:
    assert size_text(size) == text


def test_characters_to_keep_are_kept() -> None:
    assert printable("two\nlines\r", keep="\n") == "two\nlines\ufffd"


@given(st.text(), st.integers(2, 50))
def test_one_line_is_printable_and_bounded(text: str, limit: int) -> None:
    line = one_line(text, limit)
    assert line.isprintable()
    assert len(line) <= limit


def test_one_line_joins_lines_and_spaces() -> None:
    assert one_line("  no\n\tsuch   file \r\n") == "no such file"
    assert one_line("x" * 3000) == "x" * (MAX_SHOWN - 1) + "…"


@given(st.text())
def test_a_quoted_name_is_printable(name: str) -> None:
    assert quoted(name).isprintable()


@pytest.mark.parametrize(
    ("names", "shown"),
    [([], ""), (["a"], "a"), (["a", "b"], "a, b"), (["a", "b", "c"], "a, b, … (3 in all)")],
)
def test_the_first_names_are_shown_and_the_rest_counted(names: list[str], shown: str) -> None:
    assert first_of(names, 2) == shown


@given(st.text())
def test_what_is_escaped_is_printable(text: str) -> None:
    assert escaped(text).isprintable()


@pytest.mark.parametrize(
    ("text", "shown"),
    [("abc", "abc"), ("abcde", "abcde"), ("abcdef", "abcd…"), ("\0\0", "\\x00…"), ("\0" * 10**6, "\\x00…")],
)
def test_an_excerpt_is_bounded_with_its_escapes(text: str, shown: str) -> None:
    assert excerpt(text, 5) == shown


def test_escapes_show_what_was_there() -> None:
    assert escaped("a\n\x1b[31m\udcff") == "a\\n\\x1b[31m\\udcff"
