#!/usr/sbin/nbdkit python
"""nbdkit plugin: disk images in Proxmox Backup Server datastores as network block devices, read-only.

    nbdkit python nbd_bridge.py image=drive-scsi0.img vmid=103 timestamp=latest \\
        repo=reader@pbs@pbs.example.com:store1 password=+/etc/pbs-password

Callbacks for nbdkit's Python plugin; `pbsfs.nbd` does the work. nbdkit calls the callbacks after
`after_fork` from several threads at once.
"""

from __future__ import annotations

import ctypes
import logging
import os
import site
import sys
import traceback
from types import TracebackType
from typing import Any

import nbdkit

API_VERSION = 2


def _find_pbsfs() -> None:
    """Lets nbdkit's interpreter find pbsfs and its requirements.

    In this order: in the active virtual environment, in a `.venv` beside this file, beside this file.
    """
    here = os.path.dirname(os.path.realpath(__file__))
    packages = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    environments = [os.environ.get("VIRTUAL_ENV"), f"{here}/.venv"]
    places = [f"{environment}/{packages}" for environment in environments if environment]
    before = list(sys.path)
    for place in (*places, here):
        if os.path.isdir(place):
            site.addsitedir(place)
    # Packages beside pbsfs take precedence over those of the distribution.
    sys.path[:] = sys.path[len(before) :] + before


_find_pbsfs()

try:
    from pbsfs import __version__
    from pbsfs.access.credentials import take_secrets
    from pbsfs.base.errors import PbsfsError
    from pbsfs.nbd import threads
    from pbsfs.nbd.parameters import Parameters
    from pbsfs.nbd.server import Export, Server, nbd_errno
    from pbsfs.nbd.watching import Wake
    from pbsfs.runtime import process
    from pbsfs.runtime.logs import LogOptions, set_up_logging
except ImportError as error:
    python = ".".join(map(str, sys.version_info[:2]))
    sys.exit(
        f"nbd_bridge.py: nbdkit has Python {python}, which cannot import what pbsfs requires ({error}); "
        f"install pbsfs with python{python}, and activate its environment"
    )


def _silenced() -> bool:
    """Whether standard error goes to /dev/null."""
    return os.path.samestat(os.fstat(2), os.stat(os.devnull))


process.use_one_arena()
process.keep_memory_private()
set_up_logging(LogOptions())
_was_silenced = _silenced()

with open("/proc/self/cmdline", encoding="utf-8", errors="replace") as _file:
    _parameters = Parameters(take_secrets(os.environ), _file.read().split("\0"))
_servers: list[Server] = []
_log = LogOptions()

_format_exception: Any = traceback.format_exception


def _format_short(*given: Any, **options: Any) -> Any:
    """`traceback.format_exception`, except for what a callback of this file raises on purpose: one line."""
    match given:
        case (_, PbsfsError() as error, TracebackType() as trace) if trace.tb_frame.f_globals is globals():
            return [str(error)]
    return _format_exception(*given, **options)


# nbdkit's Python plugin takes an error from a callback only as an exception, and always logs it with
# `traceback.format_exception`, which it looks up each time (plugins/python/errors.c). So only a replacement
# keeps tracebacks out of the log. Every other exception is formatted as before.
traceback.format_exception = _format_short


def _wanted() -> bool:
    """Whether the client of this thread's request is connected, and nbdkit is not shutting down."""
    nanosleep = getattr(ctypes.CDLL(None), "nbdkit_nanosleep", None)
    return nanosleep is None or bool(nanosleep(0, 1) == 0)


def _end() -> None:
    """Ends nbdkit with status 1, so that a service manager starts it again.

    `nbdkit.shutdown` is not enough: it waits for clients that stay connected, and ends with status 0.
    """
    logging.shutdown()
    os._exit(1)


def _serving() -> Server:
    return _servers[0]


def dump_plugin() -> None:
    sys.stdout.write(f"pbsfs_version={__version__}\n")


def thread_model() -> int:
    return nbdkit.THREAD_MODEL_PARALLEL


def config(key: str, value: str) -> None:
    _parameters.take(key, value)


def config_complete() -> None:
    global _log  # noqa: PLW0603 - nbdkit calls functions of this module
    set_up_logging(LogOptions(format=_parameters.log_format()))
    settings = _parameters.settings()
    _log = LogOptions(format=settings.log_format)
    set_up_logging(_log)
    _servers.append(Server(settings, _wanted, _end))


def get_ready() -> None:
    _serving().check_path()


def after_fork() -> None:
    if _silenced() and not _was_silenced:  # nbdkit has daemonized
        set_up_logging(_log, background=True)
    _serving().start(Wake())


def cleanup() -> None:
    for server in _servers:
        server.stop()


def preconnect(readonly: bool) -> None:
    _serving().admit()


def list_exports(readonly: bool, is_tls: bool) -> list[tuple[str, str]]:
    return _serving().list()


def default_export(readonly: bool, is_tls: bool) -> str:
    return _serving().default()


def open(readonly: bool) -> Export:  # noqa: A001 - nbdkit's name
    export = _serving().open(nbdkit.export_name())
    threads.opened()
    return export


def close(export: Export) -> None:
    export.close()
    threads.closed()


def export_description(export: Export) -> str:
    return export.description


def get_size(export: Export) -> int:
    return export.size


def block_size(export: Export) -> tuple[int, int, int]:
    return export.block_sizes


def is_rotational(export: Export) -> bool:
    return False


def can_multi_conn(export: Export) -> bool:
    return True


def can_write(export: Export) -> bool:
    return False


def can_extents(export: Export) -> bool:
    return True


def can_cache(export: Export) -> int:
    return nbdkit.CACHE_NATIVE


def pread(export: Export, buffer: memoryview, offset: int, flags: int) -> None:
    threads.reading()
    try:
        export.read_into(buffer, offset)
    except Exception as error:
        nbdkit.set_error(nbd_errno(error))
        raise


def extents(export: Export, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    hole = nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO
    only_one = bool(flags & nbdkit.FLAG_REQ_ONE)
    found = export.extents(offset, count, only_one=only_one)
    return [(extent.offset, extent.length, hole if extent.hole else 0) for extent in found]


def cache(export: Export, count: int, offset: int, flags: int) -> None:
    export.fetch_ahead(offset, count)
