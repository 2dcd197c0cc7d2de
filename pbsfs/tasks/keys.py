"""What `pbsfs key` does: reads key files, and decrypts the key of a backup with a master key.

Synchronous, except `sealed_key`, which runs in a trio loop.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from pbsfs.base.errors import DamageError, KeyFileError, NotFoundError, OutputError, PasswordError, UsageError
from pbsfs.base.names import MASTER_KEY_BLOB
from pbsfs.base.secret import Secret
from pbsfs.formats.keyfile import KeyFile
from pbsfs.tasks.image.refusals import refusal
from pbsfs.tree import BlobFile, Node, SnapshotDirectory

MAX_PEM_SIZE = 1 << 20
"""Bytes of a master key that are read at most."""


def read(what: str, path: Path, limit: int) -> bytes:
    """The content of the file at `path`, of at most `limit` bytes. Raises KeyFileError, which starts with
    `what`."""
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise KeyFileError(f"{what} {path}: {error.strerror}; name a file that you may read") from None
    if len(data) > limit:
        raise KeyFileError(f"{what} {path}: too long for a key; name another file")
    return data


def fingerprint_of(key_file: KeyFile) -> str | None:
    """The fingerprint in the file; of a key without a password, that of the key itself. None if it is not
    known. Raises DamageError if the two differ."""
    return key_file.unlock().fingerprint if key_file.protection == "none" else key_file.fingerprint


async def sealed_key(node: Node) -> bytes:
    """The encrypted key in a snapshot. Raises UsageError, NotFoundError, and what reading raises."""
    if not isinstance(node, SnapshotDirectory):
        raise UsageError(f"{node} is not a snapshot; name one, as vm/100/latest")
    for child in (await node.children()).values():
        if isinstance(child, BlobFile) and child.file.archive == MASTER_KEY_BLOB:
            return await child.read()
    raise NotFoundError(
        f"{node} holds no key for a master key (no {MASTER_KEY_BLOB}); only backups made with one do"
    )


def decrypt(sealed: bytes, pem: bytes, name: Path, ask: Callable[[], Secret]) -> bytes:
    """The key file in `sealed`, decrypted with the master key `pem` from the file `name`.

    `ask`: called for the password of the master key if it has one. Raises KeyFileError, PasswordError.
    """
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415 - slow
    from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import load_pem_private_key  # noqa: PLC0415

    password: Secret | None = None
    try:
        try:
            private = load_pem_private_key(pem, None)
        except TypeError:  # it has a password
            password = ask()
            private = load_pem_private_key(pem, password.reveal().encode("utf-8", "surrogateescape"))
    except UnsupportedAlgorithm:
        raise KeyFileError(f"master key {name}: pbsfs does not support its type; give an RSA key") from None
    except (ValueError, TypeError):  # TypeError: for a password that is empty
        if password is not None:
            raise PasswordError(
                f"master key {name}: wrong password, or the file is damaged; give its password at the "
                "prompt or in PBS_MASTER_KEY_PASSWORD, or take another copy of the file"
            ) from None
        raise KeyFileError(
            f"master key {name}: not a private key in PEM form; give the private RSA key"
        ) from None
    if not isinstance(private, RSAPrivateKey):
        raise KeyFileError(f"master key {name}: not an RSA key; give the private RSA key")
    wrong = "the backup's key was not encrypted for this master key, or is damaged"
    try:
        text = private.decrypt(sealed, PKCS1v15())
        KeyFile.parse(text)  # the library may return random bytes for a wrong key
    except (ValueError, DamageError):
        raise KeyFileError(f"master key {name}: {wrong}") from None
    return text


def write(out: Path, text: bytes) -> None:
    """Creates a file that only its owner can read. Raises OutputError, without leaving the file."""
    try:
        fd = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb") as file:
                file.write(text)
        except OSError:
            out.unlink()
            raise
    except OSError as error:
        raise OutputError(refusal(out, error)) from None
