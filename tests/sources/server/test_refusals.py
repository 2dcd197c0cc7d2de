"""What each text that servers 3.2 to 4.2 answer with is taken for."""

from __future__ import annotations

import pytest

from pbsfs.sources.server.refusals import (
    MAX_ERROR_TEXT,
    Meaning,
    meaning_of,
    meaning_of_chunk,
    meaning_of_file,
    words_of,
)
from tests.support.server import texts


@pytest.mark.parametrize("text", texts.BROKEN_CHUNKS)
def test_a_chunk_that_the_server_calls_missing_or_broken_is_damaged(text: str) -> None:
    assert meaning_of_chunk(400, text) is Meaning.DAMAGED


@pytest.mark.parametrize("text", [*texts.PASSING_CHUNKS, "a text that no server of today has"])
def test_any_other_failure_of_a_chunk_may_pass(text: str) -> None:
    assert meaning_of_chunk(400, text) is Meaning.PASSING


@pytest.mark.parametrize("status", [404, 408, 429, 500, 502, 503, 504])
def test_a_status_alone_never_makes_a_chunk_damaged(status: int) -> None:
    for text in ("", "No such file or directory (os error 2)", "not found"):
        assert meaning_of_chunk(status, text) is Meaning.PASSING


def test_a_request_for_a_chunk_that_makes_no_sense_is_refused_for_good() -> None:
    text = "parameter verification failed - 'digest': value does not match the regex pattern"
    assert meaning_of_chunk(400, text) is Meaning.REFUSED


@pytest.mark.parametrize("text", texts.MISSING_FILES)
def test_a_file_that_does_not_exist_is_missing(text: str) -> None:
    assert meaning_of_file(400, text) is Meaning.MISSING
    assert meaning_of_file(404, 'open file "/x/index.json.blob" failed - not found') is Meaning.MISSING


@pytest.mark.parametrize("text", texts.BROKEN_FILES)
def test_an_index_that_the_server_can_not_parse_or_read_is_damaged(text: str) -> None:
    assert meaning_of_file(400, text) is Meaning.DAMAGED


@pytest.mark.parametrize("text", texts.PASSING_FILES)
def test_any_other_failure_of_a_file_may_pass(text: str) -> None:
    assert meaning_of_file(400, text) is Meaning.PASSING


@pytest.mark.parametrize("text", texts.MAINTENANCE)
def test_maintenance_that_ends_is_told_from_being_deleted(text: str) -> None:
    for meaning in (meaning_of, meaning_of_file, meaning_of_chunk):
        assert meaning(400, text) is Meaning.MAINTENANCE
        assert meaning(400, texts.DELETING) is Meaning.DELETING


@pytest.mark.parametrize("text", texts.LOCKED)
def test_both_texts_of_a_lock_are_known(text: str) -> None:
    assert meaning_of(400, text) is Meaning.LOCKED


@pytest.mark.parametrize(
    ("status", "text", "meaning"),
    [
        (401, "authentication failed - invalid credentials", Meaning.NOT_ACCEPTED),
        (400, "authentication failed", Meaning.NOT_ACCEPTED),
        (403, "permission check failed", Meaning.FORBIDDEN),
        (400, "no permissions on /datastore/x", Meaning.FORBIDDEN),
        (400, "backup owner check failed (a@pbs != b@pbs)", Meaning.FORBIDDEN),
        (400, "no such datastore 'x'", Meaning.NO_DATASTORE),
        (400, "ENOENT: No such file or directory", Meaning.MISSING),
        (400, "snapshot vm/100/2020-09-13T12:26:40Z does not exist.", Meaning.MISSING),
        (404, "Path '/nothing' not found.", Meaning.MISSING),
        (400, "missing Upgrade header", Meaning.REFUSED),
        (400, "unable to read /x/owner - Too many open files (os error 24)", Meaning.PASSING),
        (400, "EMFILE: Too many open files", Meaning.PASSING),
        (400, "unable to read /x/owner - ESTALE: Stale file handle", Meaning.PASSING),
        (400, "unable to read EVERYTHING: it is too much", Meaning.REFUSED),
        (400, texts.INTERRUPTED, Meaning.PASSING),
        (302, "", Meaning.NOT_PBS),
        (408, "", Meaning.PASSING),
        (418, "", Meaning.REFUSED),
        (429, "", Meaning.PASSING),
        (503, "", Meaning.PASSING),
    ],
)
def test_answers_to_questions(status: int, text: str, meaning: Meaning) -> None:
    assert meaning_of(status, text) is meaning


def test_words_are_one_short_line_without_the_servers_inner_names() -> None:
    assert words_of(texts.LOCKED[1].encode(), 400) == "while reading snapshot"
    assert words_of(b"a\n\x1b[2Jb \xff", 400) == "a [2Jb \N{REPLACEMENT CHARACTER}"
    assert words_of(b" \n", 400) == "status 400"
    assert len(words_of(b"x" * 100_000, 400)) == MAX_ERROR_TEXT
