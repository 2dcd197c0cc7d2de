"""Errors: one family, and one number for each kind at each door."""

from __future__ import annotations

import errno

import pytest

from pbsfs.base import errors
from pbsfs.base.errors import (
    DamageError,
    HelperError,
    KeyRequiredError,
    MountError,
    NotFoundError,
    OutputError,
    PbsfsError,
    SourceError,
    UsageError,
    errno_of,
    exit_status_of,
    with_action,
)


@pytest.mark.parametrize(
    ("kind", "number", "status"),
    [
        (PbsfsError, errno.EIO, 1),
        (UsageError, errno.EINVAL, 2),
        (NotFoundError, errno.ENOENT, 3),
        (SourceError, errno.EIO, 4),
        (KeyRequiredError, errno.EACCES, 5),
        (DamageError, errno.EIO, 6),
        (MountError, errno.EIO, 7),
        (OutputError, errno.EIO, 8),
        (HelperError, errno.EIO, 9),
    ],
)
def test_every_kind_of_error_has_its_number_at_each_door(
    kind: type[PbsfsError], number: int, status: int
) -> None:
    error = kind("what was wrong")

    assert str(error) == "what was wrong"
    assert (errno_of(error), exit_status_of(error)) == (number, status)


def test_no_two_kinds_share_an_exit_status() -> None:
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, PbsfsError)]
    own = [
        kind.exit_status for kind in kinds if "exit_status" in vars(kind)
    ]  # not one of a more general kind
    statuses = [*own, errors.INTERRUPTED_EXIT_STATUS]

    assert len(kinds) >= 8
    assert len(set(statuses)) == len(statuses)
    assert 0 not in statuses


@pytest.mark.parametrize(
    "error", [ValueError("x"), OSError(errno.ENOENT, "x"), KeyboardInterrupt(), MemoryError()]
)
def test_an_error_that_is_not_ours_never_looks_like_an_answer(error: BaseException) -> None:
    assert (errno_of(error), exit_status_of(error)) == (errno.EIO, 1)


def test_the_status_of_an_interrupt_is_the_one_that_shells_expect() -> None:
    assert errors.INTERRUPTED_EXIT_STATUS == 130


def test_a_source_error_says_whether_a_retry_may_help() -> None:
    assert SourceError("x", retryable=True).retryable
    assert not SourceError("x").retryable


SAID_BY_EACH = {"PbsfsError", "UsageError", "PasswordError", "HelperError", "PartialError"}
"""Kinds whose texts all say what to do: it differs."""


@pytest.mark.parametrize("kind", [kind for kind in vars(errors).values() if isinstance(kind, type)])
def test_what_to_do_is_said_where_the_text_does_not_say_it(kind: type) -> None:
    if not issubclass(kind, PbsfsError) or kind.__name__ in SAID_BY_EACH:
        return
    error = kind("store: status 503, SlowDown")
    assert with_action(error) == f"store: status 503, SlowDown; {error.action}"
    assert error.action
    assert with_action(kind("store: it is closed; open it")) == "store: it is closed; open it"


def test_each_kind_of_fault_of_a_source_says_what_to_do_about_it() -> None:
    assert with_action(errors.UnavailableError("x: status 503")).endswith("; try again later")
    assert with_action(errors.ConnectError("x: lost")).endswith(
        "; check the network and the server, then try again"
    )
