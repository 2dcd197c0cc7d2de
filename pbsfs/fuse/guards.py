"""The wrappers of the kernel's handlers: errors become errnos, and waiting ends with the program that waits.

pyfuse3 ends the mount when a handler raises anything but `FUSEError`. So `answers` is the one place that
turns errors into errnos; it logs those that a user should know of. Called in the trio loop.
"""

from __future__ import annotations

from pbsfs.fuse.shim import Request, last_request  # before pyfuse3, see there

import errno
import functools
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import pyfuse3
import trio

from pbsfs.base.errors import DamageError, KeyRequiredError, PbsfsError, SourceError, errno_of, with_action
from pbsfs.runtime.report import Reporter
from pbsfs.runtime.stats import COUNTS

log = logging.getLogger(__name__)

LOOKED_AT = 0.2
"""Seconds between two looks at the signals of a program that waits and got one that does not end it."""


class Reporting(Protocol):
    """An object whose methods are handlers."""

    reporter: Reporter


P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound=Reporting)


def answers(
    handler: Callable[Concatenate[S, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """Turns the errors of pbsfs into errnos, and any other into EIO."""

    @functools.wraps(handler)
    async def guarded(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await handler(self, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except PbsfsError as error:
            if isinstance(error, DamageError | KeyRequiredError | SourceError):
                COUNTS.failed(error)
                level = logging.WARNING if isinstance(error, KeyRequiredError) else logging.ERROR
                text = (
                    str(error) if isinstance(error, DamageError) else with_action(error)
                )  # one for all of it
                self.reporter.report(text, level)
            raise pyfuse3.FUSEError(errno_of(error)) from None
        except Exception:
            COUNTS.errors_internal += 1
            log.exception("%s failed", handler.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from None

    return guarded


def waits(
    handler: Callable[Concatenate[S, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """For handlers that may wait for storage: cancels them when the program gets a signal that ends it.

    Only for operations that the shim wraps.
    """

    @functools.wraps(handler)
    async def interruptible(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        scope = trio.CancelScope()

        def on_signal(request: Request) -> None:
            if request.is_given_up():
                scope.cancel()
            else:
                trio.lowlevel.spawn_system_task(_watch, request, scope)

        with scope, Request(last_request(), on_signal):
            return await handler(self, *args, **kwargs)
        raise pyfuse3.FUSEError(errno.EINTR)

    return interruptible


async def _watch(request: Request, scope: trio.CancelScope) -> None:
    """Cancels `scope` when the program is to end, whose first signal was another: nobody reports the next."""
    while request.is_handled:
        if request.is_given_up():
            scope.cancel()
        await trio.sleep(LOOKED_AT)
