"""What a process that this one starts gets of the source: who has to be asked is asked here.

Used by the commands that start a process which reads: the mount in the background, and nbdkit. What can
be read only once is read here. Secrets go through pipes: neither the arguments nor the environment of a
process that lives for weeks should hold them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pbsfs.cli.options import find_terminal
from pbsfs.config import (
    KEY_PASSWORD_VARIABLE,
    PASSWORD_VARIABLE,
    SourceOptions,
    find_access,
    open_keys,
)
from pbsfs.credentials import SECRET_FORMS, Secret
from pbsfs.errors import UsageError
from pbsfs.keyring import KeyRing


@dataclass(frozen=True, slots=True)
class Handover:
    """`source`: with all that was found out. `password`: None where none is needed."""

    source: SourceOptions
    password: Secret | None
    keys: KeyRing

    def environment(self) -> dict[str, str]:
        """The environment of this process without secrets."""
        secret = {KEY_PASSWORD_VARIABLE + suffix for suffix in SECRET_FORMS}
        if self.password is not None:
            secret |= {PASSWORD_VARIABLE + suffix for suffix in SECRET_FORMS}
        return {name: value for name, value in os.environ.items() if name not in secret}

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


def hand_over(source: SourceOptions) -> Handover:
    """Raises UsageError, KeyFileError, PasswordError, and what connecting to the server raises."""
    keys = open_keys(source, os.environ, find_terminal(), ask_for_default=True)
    source = replace(source, keyfiles=(), keyfd=None)
    if source.datastore_dir is not None:
        if source.repository is not None:
            raise UsageError("--repository and --datastore-dir exclude each other")
        directory = Path(os.path.abspath(source.datastore_dir))
        return Handover(replace(source, datastore_dir=directory), None, keys)
    access = find_access(source, os.environ, find_terminal())
    found = replace(source, repository=str(access.repository), fingerprint=access.trust.pinned)
    return Handover(found, access.secret, keys)


def _pipe_with(data: bytes) -> int:
    """The reading end of a pipe that holds `data`, less than a pipe's buffer (64 KiB): this does not wait."""
    reading, writing = os.pipe()
    with open(writing, "wb") as pipe:
        pipe.write(data)
    return reading
