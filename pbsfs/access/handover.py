"""What a process that this one starts gets of the source: who has to be asked is asked here.

Used by the commands that start a process which reads: the mount in the background, and nbdkit. What can
be read only once is read here. Secrets go through anonymous memory (memfd_create(2)): neither
the arguments nor the environment of a process that lives for weeks should hold them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from pbsfs.access.config import SourceOptions, Terminal, find_access, open_keys, resolve
from pbsfs.access.keyring import KeyRing
from pbsfs.base.secret import Secret


@dataclass(frozen=True, slots=True)
class Handover:
    """`source`: with all that was found out. `password`: None where none is needed."""

    source: SourceOptions
    password: Secret | None
    keys: KeyRing

    @contextmanager
    def descriptors(self) -> Iterator[tuple[int, int | None]]:
        """For a child to inherit: memory with the keys, and with the password."""
        with ExitStack() as stack:
            keys = _memory_with(self.keys.dump())
            stack.callback(os.close, keys)
            password = None
            if self.password is not None:
                password = _memory_with(self.password.reveal().encode("utf-8", "surrogateescape") + b"\n")
                stack.callback(os.close, password)
            yield keys, password


def hand_over(source: SourceOptions, environment: Mapping[str, str], terminal: Terminal | None) -> Handover:
    """Raises UsageError, KeyFileError, PasswordError, and what connecting to the server raises."""
    source = resolve(source, environment)
    keys = open_keys(source, environment, terminal, ask_for_default=True)
    source = replace(source, keyfiles=(), keyfd=None)
    if source.datastore_dir is not None:
        return Handover(source, None, keys)
    access = find_access(source, environment, terminal)
    return Handover(replace(source, fingerprint=access.trust.pinned or ""), access.secret, keys)


def _memory_with(data: bytes) -> int:
    """A descriptor of memory that holds `data`, at its start. A pipe would block when its buffer is full."""
    fd = os.memfd_create("pbsfs")
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
        os.lseek(fd, 0, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd
