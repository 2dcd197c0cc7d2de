"""What a process that this one starts gets of the source: who has to be asked is asked here.

Used by the commands that start a process which reads: the mount in the background, and nbdkit. What can
be read only once is read here. Secrets go through pipes: neither the arguments nor the environment of a
process that lives for weeks should hold them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
        """Reading ends of pipes, for a child to inherit: of the keys, and of the password."""
        keys = _pipe_with(self.keys.dump())
        password = None
        try:
            if self.password is not None:
                password = _pipe_with(self.password.reveal().encode("utf-8", "surrogateescape") + b"\n")
            yield keys, password
        finally:
            os.close(keys)
            if password is not None:
                os.close(password)


def hand_over(source: SourceOptions, environment: Mapping[str, str], terminal: Terminal | None) -> Handover:
    """Raises UsageError, KeyFileError, PasswordError, and what connecting to the server raises."""
    source = resolve(source, environment)
    keys = open_keys(source, environment, terminal, ask_for_default=True)
    source = replace(source, keyfiles=(), keyfd=None)
    if source.datastore_dir is not None:
        return Handover(source, None, keys)
    access = find_access(source, environment, terminal)
    return Handover(replace(source, fingerprint=access.trust.pinned or ""), access.secret, keys)


def _pipe_with(data: bytes) -> int:
    """The reading end of a pipe that holds `data`, less than a pipe's buffer (64 KiB): this does not wait."""
    reading, writing = os.pipe()
    with open(writing, "wb") as pipe:
        pipe.write(data)
    return reading
