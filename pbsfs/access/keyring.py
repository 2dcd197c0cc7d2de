"""The available keys, by fingerprint: each snapshot uses the key that it names.

pbsfs reads and unlocks key files once, at the start. Files that the user names must be usable; pbsfs ignores
unusable files in the usual places. Synchronous.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from pbsfs.base.errors import DamageError, KeyFileError, PasswordError
from pbsfs.base.secret import Secret
from pbsfs.formats.keyfile import MAX_KEY_FILE_SIZE, KeyFile
from pbsfs.formats.keys import Key

log = logging.getLogger(__name__)

KEY_DIRECTORIES = (Path("/etc/pve/priv/storage"), Path("/etc/proxmox-backup/encryption-keys"))
"""Where Proxmox VE keeps the key of each storage, as `<storage>.enc`, and Proxmox Backup Server (from 4.1.9)
the keys with which it encrypts what it copies to other servers, as `<id>.enc`."""

MAX_KEYS = 1000
"""Keys at once: more than hosts share a server."""

_SUFFIXES = (".json", ".enc", ".key")

Ask = Callable[[Path, KeyFile], Secret | None]
"""Asks for the password of a key file; None without a terminal."""


class KeyRing(Mapping[str, Key]):
    """Keys by fingerprint. Immutable."""

    def __init__(self, keys: Iterable[Key] = ()) -> None:
        self._keys = {key.fingerprint: key for key in keys}

    def __getitem__(self, fingerprint: str) -> Key:
        return self._keys[fingerprint.lower()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def dump(self) -> bytes:
        """All keys, for another process of pbsfs."""
        return json.dumps([base64.b64encode(key.reveal()).decode() for key in self._keys.values()]).encode()

    @classmethod
    def load(cls, data: bytes) -> KeyRing:
        """The inverse of `dump`."""
        return cls(Key(base64.b64decode(key)) for key in json.loads(data))


def read_keys(
    files: Iterable[Path],
    *,
    given: bytes | None,
    password: Secret | None,
    ask: Ask,
    ask_for_default: bool = False,
    config_home: Path | None,
) -> KeyRing:
    """The keys in `files` (key files, or directories of some), or else those in the usual places.

    `given`: the content of a key file that came through a descriptor. `password`: pbsfs tries it for each
    file that needs one. `ask_for_default`: also ask for the password of the key of proxmox-backup-client,
    which the user did not name. Raises KeyFileError and PasswordError for named files, and for a named
    directory without a usable key: without keys pbsfs would not verify signatures.
    """
    keys = []
    if given is not None:
        keys.append(_unlock(Path("(descriptor)"), _parse(Path("(descriptor)"), given), password, ask))
    named = list(files)
    for path in named:
        if os.path.isdir(path):
            keys += _those_in(path, password)
        else:
            keys.append(_unlock(path, _parse(path, _read(path)), password, ask))
    if given is None and not named:
        if config_home is not None:
            default = config_home / "proxmox-backup" / "encryption-key.json"
            if os.path.lexists(default):
                keys += _default(default, password, ask if ask_for_default else None)
        for directory in KEY_DIRECTORIES:
            with contextlib.suppress(OSError):  # missing, or not readable for this user
                keys += _usual(_in_directory(directory), password)[0]
    if len(keys) > MAX_KEYS:
        raise KeyFileError(f"{len(keys)} keys are too many; {MAX_KEYS} is the most")
    return KeyRing(keys)


def _default(path: Path, password: Secret | None, ask: Ask | None) -> list[Key]:
    """The key of proxmox-backup-client. The user may answer nothing and continue without it."""
    keys, unusable = _usual([path], password)
    if ask is not None and any(isinstance(error, PasswordError) for error in unusable):
        file = _parse(path, _read(path, only_regular=True))
        answer = ask(path, file)
        if answer is not None and answer.reveal():
            keys = [_unlock(path, file, answer, ask)]
    return keys


def _those_in(path: Path, password: Secret | None) -> list[Key]:
    """The usable keys in a named directory, at least one."""
    try:
        keys, unusable = _usual(_in_directory(path), password)
    except OSError as error:
        raise KeyFileError(
            f"key directory {path}: {error.strerror}; name a directory that you may read"
        ) from None
    if keys:
        return keys
    if unusable:
        raise unusable[0]
    raise KeyFileError(
        f"key directory {path}: there is no key file in it; name one (*{', *'.join(_SUFFIXES)})"
    )


def _in_directory(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.suffix in _SUFFIXES)[: MAX_KEYS + 1]


def _usual(
    files: Iterable[Path], password: Secret | None
) -> tuple[list[Key], list[KeyFileError | PasswordError]]:
    """The keys of the usable files, and the errors of the others."""
    keys: list[Key] = []
    unusable: list[KeyFileError | PasswordError] = []
    for path in files:
        try:
            text = _read(path, only_regular=True)
            keys.append(_unlock(path, _parse(path, text), password, lambda _path, _file: None))
        except (KeyFileError, PasswordError) as error:
            log.info("not used: %s", error)
            unusable.append(error)
    return keys, unusable


def _read(path: Path, *, only_regular: bool = False) -> bytes:
    """`only_regular`: refuse a named pipe, which may have no writer; a pipe that the user names has one."""

    def open_it(name: str, flags: int) -> int:
        return os.open(name, flags | (os.O_NONBLOCK if only_regular else 0))

    try:
        with open(path, "rb", opener=open_it) as file:
            if only_regular and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise KeyFileError(f"key file {path}: not a regular file")
            return file.read(MAX_KEY_FILE_SIZE + 1)
    except OSError as error:
        raise KeyFileError(f"key file {path}: {error.strerror}; name a file that you may read") from None


def _parse(path: Path, text: bytes) -> KeyFile:
    try:
        return KeyFile.parse(text)
    except DamageError as error:
        raise KeyFileError(f"key file {path}: {error}") from None


def _unlock(path: Path, file: KeyFile, password: Secret | None, ask: Ask) -> Key:
    action = "correct PBS_ENCRYPTION_PASSWORD (or _FD, _FILE, _CMD), or key-password in the profile"
    if file.protection != "none" and password is None:
        password = ask(path, file)
        action = "try again" if password is not None else "set PBS_ENCRYPTION_PASSWORD (or _FD, _FILE, _CMD)"
    try:
        return file.unlock(None if password is None else password.reveal().encode("utf-8", "surrogateescape"))
    except PasswordError as error:
        raise PasswordError(f"key file {path}: {error}; {action}") from None
    except DamageError as error:
        raise KeyFileError(f"key file {path}: {error}") from None
