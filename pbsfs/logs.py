"""Where the log goes. Set up once by the door that is used, before anything is logged."""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys
from pathlib import Path

from pbsfs.errors import UsageError

_SYSLOG_SOCKET = Path("/dev/log")


def set_up_logging(level: str, file: Path | None, *, background: bool = False) -> None:
    """Sends the log to `file`, or to standard error, or from the background to the system's log.

    Raises UsageError where `file` can't be written.
    """
    handler: logging.Handler
    if file is not None:
        try:
            handler = logging.FileHandler(file)
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
    logging.basicConfig(level=level.upper(), format=form, handlers=[handler], force=True)
    for chatty in ("h2", "hpack", "pyfuse3"):  # each header and request: of no use even for debugging
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _background_handler() -> logging.Handler:
    """Syslog (which journald collects too), or where there is none a file of the user's."""
    if _SYSLOG_SOCKET.exists():
        try:
            return logging.handlers.SysLogHandler(
                str(_SYSLOG_SOCKET), facility=logging.handlers.SysLogHandler.LOG_DAEMON
            )
        except OSError:
            pass
    import platformdirs  # noqa: PLC0415 - only where it is needed

    return logging.FileHandler(platformdirs.user_log_path("pbsfs", ensure_exists=True) / "mount.log")
