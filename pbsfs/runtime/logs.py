"""Where the log goes. Each program sets it up once, before it logs anything."""

from __future__ import annotations

import errno
import logging
import logging.handlers
import os
import sys
from pathlib import Path
from typing import Any

from pbsfs.base.errors import UsageError
from pbsfs.base.text import escaped, printable
from pbsfs.runtime.places import state_home

STARTING = logging.getLogger("pbsfs.starting")
"""For what the user who starts a program has to know: written to standard error besides the log."""

_SYSLOG_SOCKET = Path("/dev/log")


class _OneLine(logging.Formatter):
    """A message is one line of text that can be shown: names and answers come from anywhere."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        record.message = escaped(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """The traceback, indented: an exception's text may hold a line that looks like a record."""
        lines = super().formatException(ei).split("\n")
        return "\n".join(f"  {printable(line)}" for line in lines)


def set_up_logging(level: str, file: Path | None, *, background: bool = False) -> None:
    """Sends the log to `file`, or to standard error, or from the background to the system's log.

    Raises UsageError where `file` can't be written.
    """
    handler: logging.Handler
    if file is not None:
        try:
            handler = _file_handler(file)
        except OSError as error:
            raise UsageError(f"cannot write the log file {file}: {error.strerror}") from None
    elif background:
        handler = _background_handler()
    else:
        handler = logging.StreamHandler(sys.stderr)
    if isinstance(handler, logging.handlers.SysLogHandler):
        handler.ident = f"pbsfs[{os.getpid()}]: "
        form = "%(levelname)s %(message)s"
    elif isinstance(handler, logging.FileHandler):
        form = "%(asctime)s %(levelname)s %(message)s"
    else:
        form = "pbsfs: %(levelname)s: %(message)s"
    handler.setFormatter(_OneLine(form))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    STARTING.handlers.clear()
    if file is not None or background:
        also = logging.StreamHandler(sys.stderr)
        also.setFormatter(_OneLine("pbsfs: %(levelname)s: %(message)s"))
        STARTING.addHandler(also)
    for chatty in ("h2", "hpack", "pyfuse3"):  # each header and request: of no use even for debugging
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("pyfuse3").addFilter(_is_missed)


def _is_missed(record: logging.LogRecord) -> bool:
    """False for pyfuse3's report that the kernel did not take a reply, since it no longer knows the request.

    That is ENOENT, and nothing is missed then: the reader was killed, or the mount is gone.
    """
    return not (
        "fuse_reply_* failed" in record.getMessage() and os.strerror(errno.ENOENT) in record.getMessage()
    )


def _file_handler(file: Path) -> logging.Handler:
    return logging.FileHandler(file, encoding="utf-8", errors="backslashreplace")


def _background_handler() -> logging.Handler:
    """Syslog (which journald collects too), or where there is none a file of the user's.

    Where there is neither, standard error, which a background mount keeps only until it serves: so what goes
    wrong at the start is seen, and that nothing is logged afterwards is said there.
    """
    if _SYSLOG_SOCKET.exists():
        try:
            return logging.handlers.SysLogHandler(
                str(_SYSLOG_SOCKET), facility=logging.handlers.SysLogHandler.LOG_DAEMON
            )
        except OSError:
            pass
    state = state_home(os.environ)
    reason = "this user has no home directory"
    if state is not None:
        file = state / "pbsfs" / "log" / "mount.log"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            return _file_handler(file)
        except OSError as error:
            reason = f"{error.filename}: {error.strerror}"
    if sys.stderr is not None:
        sys.stderr.write(
            f"pbsfs: the log goes nowhere: there is no syslog, and no file can be written ({reason}); "
            "name one with --log-file\n"
        )
    return logging.StreamHandler(sys.stderr)
