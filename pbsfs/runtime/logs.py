"""Where the log goes, and in which format. Each program sets it up before it logs anything.

Called by commands and by nbdkit's plugin, from one thread.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pbsfs.base.errors import UsageError
from pbsfs.base.text import escaped, printable, quoted
from pbsfs.runtime.places import state_home

FORMATS = ("text", "json")

FORMAT_VARIABLE = "PBSFS_LOG_FORMAT"

STARTING = logging.getLogger("pbsfs.starting")
"""For what the user who starts a program has to know: written to standard error besides the log."""

SYSLOG_SOCKET = Path("/dev/log")

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
"""The attributes of every log record; others are fields of one message (`extra=`)."""


@dataclass(frozen=True, slots=True)
class LogOptions:
    """`level`: the least level of messages. `file`: the log is appended to it; None for the usual place.

    `format`: one of FORMATS; None where neither an option nor the environment gives it, which is text unless
    a profile says otherwise.
    """

    level: str = "warning"
    file: Path | None = None
    format: str | None = None


def parse_format(text: str) -> str:
    """One of FORMATS. Raises UsageError."""
    if text not in FORMATS:
        raise UsageError(f"log format {quoted(text)}: unknown; use {' or '.join(FORMATS)}")
    return text


class _OneLine(logging.Formatter):
    """A message is one line of text that can be shown: names and answers come from anywhere."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        record.message = escaped(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """The traceback, indented: an exception's text may hold a line that looks like a record."""
        lines = super().formatException(ei).split("\n")
        return "\n".join(f"  {printable(line)}" for line in lines)


class _Json(logging.Formatter):
    """A message is one JSON object in one line: `time` (RFC 3339, UTC), `level`, `logger`, `message`, the
    fields of the message, and `traceback` for an unexpected failure.

    Text is as it was, not escaped for people. Only bytes that are not UTF-8 become `\\udcXX`, since many JSON
    parsers refuse lone surrogates.
    """

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds")
        found = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        found |= {
            name: value for name, value in record.__dict__.items() if name not in _STANDARD | set(found)
        }
        if record.exc_info:
            found["traceback"] = self.formatException(record.exc_info)
        line = json.dumps(found, ensure_ascii=False, default=str)
        return "".join(c if c.isprintable() else _json_escape(c) for c in line)


def _json_escape(c: str) -> str:
    return f"\\\\u{ord(c):04x}" if "\ud800" <= c <= "\udfff" else json.dumps(c)[1:-1]


class _File(logging.FileHandler):
    """A log file. The first message that it does not take is reported on standard error; the program goes
    on."""

    def __init__(self, file: Path) -> None:
        super().__init__(file, encoding="utf-8", errors="backslashreplace")
        self._is_reported = False

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it was reported
            super().close()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._is_reported:
            self._is_reported = True
            text = f"{self.baseFilename}: {error.strerror}; free some space, or name another file"
            if sys.stderr is not None:
                with contextlib.suppress(OSError, ValueError):
                    sys.stderr.write(f"pbsfs: cannot write the log file {escaped(text)}\n")


def set_up_logging(options: LogOptions, *, background: bool = False) -> None:
    """Sends the log to the file, or to standard error, or from the background to the system's log.

    Raises UsageError where the file can't be written.
    """
    handler: logging.Handler
    file = options.file
    if file is not None:
        try:
            handler = _file_handler(file)
        except OSError as error:
            raise UsageError(f"cannot write the log file {file}: {error.strerror}; name another") from None
    elif background:
        handler = _background_handler()
    else:
        handler = logging.StreamHandler(sys.stderr)
    if isinstance(handler, logging.FileHandler):
        form = "%(asctime)s %(levelname)s %(message)s"
    elif isinstance(handler, logging.StreamHandler):
        form = "pbsfs: %(levelname)s: %(message)s"
    else:
        form = "%(levelname)s %(message)s"  # syslog adds the rest
    handler.setFormatter(_Json() if options.format == "json" else _OneLine(form))
    logging.basicConfig(level=options.level.upper(), handlers=[handler], force=True)
    STARTING.handlers.clear()
    if file is not None or background:
        also = logging.StreamHandler(sys.stderr)
        also.setFormatter(_OneLine("pbsfs: %(levelname)s: %(message)s"))
        STARTING.addHandler(also)
    for chatty in ("h2", "hpack", "pyfuse3"):  # each header and request: of no use even for debugging
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("pyfuse3").addFilter(_is_missed)


def log_failure(text: str, exit_status: int) -> bool:
    """Logs that the program ends with a failure, if standard error gets the log as JSON; else returns False.

    Then the caller prints the line: what reads the JSON need not expect other text in it.
    """
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler and isinstance(handler.formatter, _Json):
            logging.getLogger("pbsfs").error("%s", text, extra={"exit_status": exit_status})
            return True
    return False


def _is_missed(record: logging.LogRecord) -> bool:
    """False for pyfuse3's report that the kernel did not take a reply, since it no longer knows the request.

    That is ENOENT, and nothing is missed then: the reader was killed, or the mount is gone.
    """
    return not (
        "fuse_reply_* failed" in record.getMessage() and os.strerror(errno.ENOENT) in record.getMessage()
    )


def _file_handler(file: Path) -> logging.Handler:
    return _File(file)


def _background_handler() -> logging.Handler:
    """Syslog (which journald collects too), or where there is none a file of the user's.

    Where there is neither, standard error, which a background mount keeps only until it serves: so what goes
    wrong at the start is seen, and that nothing is logged afterwards is said there.
    """
    if SYSLOG_SOCKET.exists():
        from logging.handlers import SysLogHandler  # noqa: PLC0415 - slow to import, and commands log elsewhere

        try:
            syslog = SysLogHandler(str(SYSLOG_SOCKET), facility=SysLogHandler.LOG_DAEMON)
        except OSError:
            pass
        else:
            syslog.ident = f"pbsfs[{os.getpid()}]: "
            return syslog
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
