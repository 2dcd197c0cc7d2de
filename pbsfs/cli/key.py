"""`pbsfs key`: what key files say, and a key out of a backup that was made with a master key."""

from __future__ import annotations

import os
from pathlib import Path

import click

from pbsfs.access.credentials import KEY_PASSWORD_VARIABLE, MASTER_PASSWORD_VARIABLE, find_secret
from pbsfs.access.options import SourceOptions
from pbsfs.base.errors import DamageError, KeyFileError, NotFoundError, OutputError, PasswordError, UsageError
from pbsfs.base.names import MASTER_KEY_BLOB
from pbsfs.base.secret import Secret
from pbsfs.base.text import printable
from pbsfs.cli.inside import find, from_mounts
from pbsfs.cli.options import (
    FilePath,
    environment,
    find_terminal,
    logging_options,
    run_on_tree,
    source_options,
)
from pbsfs.formats.keyfile import MAX_KEY_FILE_SIZE, KeyFile
from pbsfs.runtime.logs import set_up_logging
from pbsfs.tasks.image.refusals import refusal
from pbsfs.tree import BlobFile, SnapshotDirectory, Tree

MAX_PEM_SIZE = 1 << 20


@click.group("key", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Look at key files, and recover keys with a master key.

    \b
    Examples:
      pbsfs key show ~/.config/proxmox-backup/encryption-key.json
      pbsfs key recover --master-key private.pem vm/106/latest key.json
    """


@command.command("show")
@click.argument("file", type=FilePath())
def show(file: Path) -> None:
    """Print what FILE says of its key; no password is needed.

    \b
    Example:
      pbsfs key show ~/.config/proxmox-backup/encryption-key.json
    """
    try:
        key_file = KeyFile.parse(_read("key file", file, MAX_KEY_FILE_SIZE))
        fingerprint = _fingerprint(key_file)
    except DamageError as error:
        raise KeyFileError(f"key file {file}: {error}") from None
    facts = {
        "kdf": key_file.protection,
        "created": key_file.created,
        "modified": key_file.modified,
        "fingerprint": fingerprint,
        "hint": key_file.hint,
    }
    for name, value in facts.items():
        if value is not None:
            click.echo(f"{name + ':':<13}{printable(value)}")


@command.command("recover")
@click.argument("snapshot")
@click.argument("out", metavar="OUT.json", type=FilePath())
@click.option(
    "--master-key",
    metavar="PRIVATE.pem",
    type=FilePath(),
    required=True,
    help="The private RSA key. Its password, where it has one: PBS_MASTER_KEY_PASSWORD, or asked for.",
)
@source_options
@logging_options
def recover(
    snapshot: str, out: Path, master_key: Path, log_level: str, log_file: Path | None, source: SourceOptions
) -> None:
    """Take the key of SNAPSHOT out of it, with the master key it was made with, and write it to OUT.json.

    The key file that is written has no password: keep it well.

    \b
    Example:
      pbsfs key recover --master-key private.pem vm/106/latest key.json
    """
    set_up_logging(log_level, log_file)
    source, (snapshot,) = from_mounts(source, [snapshot])
    pem = _read("master key", master_key, MAX_PEM_SIZE)
    if os.path.lexists(out):
        raise OutputError(f"{out} exists; remove it, or name another file")

    async def work(tree: Tree) -> bytes:
        node = await find(tree, snapshot, source)
        if not isinstance(node, SnapshotDirectory):
            raise UsageError(f"{node} is not a snapshot")
        for child in (await node.children()).values():
            if isinstance(child, BlobFile) and child.file.archive == MASTER_KEY_BLOB:
                return await child.read()
        raise NotFoundError(f"{node} holds no key for a master key (no {MASTER_KEY_BLOB})")

    sealed = run_on_tree(work, source=source)
    text = _decrypt(sealed, pem, master_key)
    try:
        fingerprint = _fingerprint(KeyFile.parse(text))
    except DamageError as error:
        raise DamageError(f"the key of {snapshot}: {error}") from None
    _write(out, text)
    click.echo(f"{out}: the key {printable(fingerprint or '(its fingerprint takes its password)')}")


def _fingerprint(key_file: KeyFile) -> str | None:
    """What the file says; without a password, what its key has. Raises DamageError where these differ."""
    return key_file.unlock().fingerprint if key_file.protection == "none" else key_file.fingerprint


def _write(out: Path, text: bytes) -> None:
    """Makes a file that only its owner can read. Raises OutputError, and leaves nothing then."""
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


def _decrypt(sealed: bytes, pem: bytes, name: Path) -> bytes:
    """The key file in `sealed`. Raises KeyFileError, PasswordError, DamageError."""
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415 - slow
    from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import load_pem_private_key  # noqa: PLC0415

    password: Secret | None = None
    try:
        try:
            private = load_pem_private_key(pem, None)
        except TypeError:  # it has a password
            password = _master_password(name)
            private = load_pem_private_key(pem, password.reveal().encode("utf-8", "surrogateescape"))
    except UnsupportedAlgorithm:
        raise KeyFileError(f"master key {name}: of a kind that is not known") from None
    except (ValueError, TypeError):  # TypeError: for a password that is empty
        if password is not None:
            raise PasswordError(f"master key {name}: wrong password, or damaged") from None
        raise KeyFileError(f"master key {name}: not a private key in PEM form") from None
    if not isinstance(private, RSAPrivateKey):
        raise KeyFileError(f"master key {name}: not an RSA key")
    wrong = "the backup's key was not encrypted for this master key, or is damaged"
    try:
        text = private.decrypt(sealed, PKCS1v15())
        KeyFile.parse(text)  # a wrong key may also decrypt to something, by design of the library
    except (ValueError, DamageError):
        raise KeyFileError(f"master key {name}: {wrong}") from None
    return text


def _master_password(name: Path) -> Secret:
    for variable in (MASTER_PASSWORD_VARIABLE, KEY_PASSWORD_VARIABLE):
        found = find_secret(variable, variable.removeprefix("PBS_").lower().replace("_", "-"), environment())
        if found is not None:
            return found
    terminal = find_terminal()
    if terminal is None:
        raise PasswordError(
            f"master key {name}: it needs a password; set {MASTER_PASSWORD_VARIABLE} (or _FD, _FILE, _CMD)"
        )
    return terminal.password(f"password of the master key {name}")


def _read(what: str, path: Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes; `what`: its name in the KeyFileError."""
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise KeyFileError(f"{what} {path}: {error.strerror}; name a file that you may read") from None
    if len(data) > limit:
        raise KeyFileError(f"{what} {path}: too long for a key; name another file")
    return data
