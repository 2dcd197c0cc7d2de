"""Python's state of nbdkit's threads, kept from one call to the next.

nbdkit's plugin surrounds each call with PyGILState_Ensure and PyGILState_Release (ACQUIRE_PYTHON_GIL… in its
plugins/python). Python knows nothing of threads that it did not start, so that pair makes a state for the
thread each time, with a stack that is mapped, and frees it again: a third of the processor time of a small
read. With one more PyGILState_Ensure, the state lives on.

A kept state has to be freed by its own thread, and before Python ends. nbdkit waits for the threads that only
answer requests, and ends Python later: these free it when they end. It does not wait for the end of the
thread of a connection, so that one frees its state when it closes its export.

For threads that nbdkit started, and while it calls the plugin.
"""

from __future__ import annotations

import ctypes
import threading

_LOCKED, _UNLOCKED = 0, 1
"""PyGILState_STATE: whether the thread holds Python's lock after PyGILState_Release."""

_ensure = ctypes.pythonapi.PyGILState_Ensure
_release = ctypes.pythonapi.PyGILState_Release
_release.argtypes = (ctypes.c_int,)
_release.restype = None

_at_end_of_thread = getattr(ctypes.CDLL(None), "__cxa_thread_atexit_impl", None)
"""Has a function called with an argument at the end of the calling thread (glibc); the last one first."""
if _at_end_of_thread is not None:
    _at_end_of_thread.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)


class _Thread(threading.local):
    """What is known of the calling thread. `kept`: whether its state is kept. `opened`: its open exports."""

    kept = False
    opened = 0


_here = _Thread()


def opened() -> None:
    """Keeps the state of the calling thread, which opened an export, until it has closed all of them."""
    if _here.kept and not _here.opened:
        return  # until it ends
    if not _here.kept:
        _keep()
    _here.opened += 1


def closed() -> None:
    """Takes note that the calling thread closed an export."""
    if _here.opened:  # a filter may close what another thread opened
        _here.opened -= 1
        if not _here.opened:
            _here.kept = False
            _release(_LOCKED)


def reading() -> None:
    """Keeps the state of the calling thread until it ends, if it is not kept yet."""
    if not _here.kept and _at_end_of_thread is not None:
        _keep()
        for function, argument in ((_release, _UNLOCKED), (_release, _LOCKED), (_ensure, 0)):
            place = ctypes.cast(function, ctypes.c_void_p)
            _at_end_of_thread(place, argument, place)


def _keep() -> None:
    _ensure()
    _here.kept = True
