"""Takes from the current process all that parsing needs not: files, network, privileges, memory, time.

Called once by the parser process, after it has imported everything. Linux; what this kernel does not offer is
left out, and the rest stands.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
from contextlib import suppress

MEMORY = 512 << 20
"""Bytes of address space. An interpreter with its libraries takes some 60 MiB of it."""

SECONDS = 120.0
"""Seconds of the processor for one request."""

_PR_SET_DUMPABLE = 4
_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2
_RET_ALLOW, _RET_ERRNO, _RET_KILL = 0x7FFF0000, 0x00050000, 0x80000000
_EPERM = 1

_CALLS = {
    # read write close poll mmap mprotect munmap brk rt_sigaction rt_sigprocmask rt_sigreturn mremap madvise
    # sendto recvfrom sendmsg recvmsg exit restart_syscall gettimeofday sched_yield futex clock_gettime
    # exit_group ppoll setitimer getpid gettid sigaltstack getrandom rseq
    "x86_64": (
        0xC000003E,
        (
            *(0, 1, 3, 7, 9, 10, 11, 12, 13, 14, 15, 25, 28, 44, 45, 46, 47, 60, 219, 96, 24, 202, 228),
            *(231, 271, 38, 39, 186, 131, 318, 334),
        ),
    ),
    "aarch64": (
        0xC00000B7,
        (
            *(63, 64, 57, 222, 226, 215, 214, 134, 135, 139, 216, 233, 206, 207, 211, 212, 93, 128, 169, 124),
            *(98, 113, 94, 73, 103, 172, 178, 132, 278, 293),
        ),
    ),
}
"""The identifier of each architecture (linux/audit.h), and the numbers of the system calls above."""


def enter(memory: int = MEMORY) -> bool:
    """Returns whether the kernel limits the system calls too. Raises OSError where nothing can be limited."""
    for limit, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        _soft, hard = resource.getrlimit(limit)
        new = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (new, new))
    if os.geteuid() == 0:
        with suppress(PermissionError):  # in a user namespace
            os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return False
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, 1))  # poll(2) refuses more descriptors than the limit
    return _limit_calls(libc)


def start_clock(seconds: float = SECONDS) -> None:
    """From here on, that much processor time ends the process: it parses what never ends."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def stop_clock() -> None:
    """Ends what `start_clock` began: the process waits for the next request."""
    signal.setitimer(signal.ITIMER_PROF, 0)


def _limit_calls(libc: ctypes.CDLL) -> bool:
    """A filter of seccomp(2): the calls above; all others fail with EPERM."""
    if platform.machine() not in _CALLS:
        return False
    architecture, calls = _CALLS[platform.machine()]
    program = [(0x20, 0, 0, 4), (0x15, 1, 0, architecture), (0x06, 0, 0, _RET_KILL), (0x20, 0, 0, 0)]
    for number, call in enumerate(calls):
        program.append((0x15, len(calls) - number, 0, call))
    program += [(0x06, 0, 0, _RET_ERRNO | _EPERM), (0x06, 0, 0, _RET_ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *step) for step in program))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))

    filter_ = Program(len(program), ctypes.addressof(code))
    return not libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(filter_), 0, 0)
