"""`pbsfs key`: shows key files, and recovers the key of a backup that was made with a master key."""

from __future__ import annotations

import os
from pathlib import Path

import click

from pbsfs.access.credentials import KEY_PASSWORD_VARIABLE, MASTER_PASSWORD_VARIABLE, find_secret
from pbsfs.access.options import SourceOptions
from pbsfs.base.errors import DamageError, KeyFileError, OutputError, PasswordError
from pbsfs.base.secret import Secret
from pbsfs.base.text import printable
from pbsfs.cli.inside import find, from_mounts
from pbsfs.cli.options import logging_options, source_options
from pbsfs.cli.parameters import FilePath
from pbsfs.cli.running import environment, find_terminal, run_on_tree
from pbsfs.formats.keyfile import MAX_KEY_FILE_SIZE, KeyFile
from pbsfs.runtime.logs import LogOptions, set_up_logging
from pbsfs.tasks.keys import MAX_PEM_SIZE, decrypt, fingerprint_of, read, sealed_key, write
from pbsfs.tree import Tree


@click.group("key", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Show key files, and recover keys with a master key.

    \b
    Examples:
      pbsfs key show ~/.config/proxmox-backup/encryption-key.json
      pbsfs key recover --master-key private.pem vm/106/latest key.json
    """


@command.command("show", short_help="Show the facts about a key file.")
@click.argument("file", type=FilePath())
def show(file: Path) -> None:
    """Print the facts about the key in FILE; this requires no password.

    \b
    Example:
      pbsfs key show ~/.config/proxmox-backup/encryption-key.json
    """
    try:
        key_file = KeyFile.parse(read("key file", file, MAX_KEY_FILE_SIZE))
        fingerprint = fingerprint_of(key_file)
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


@command.command("recover", short_help="Recover the key of a snapshot with a master key.")
@click.argument("snapshot")
@click.argument("out", metavar="OUT.json", type=FilePath())
@click.option(
    "--master-key",
    metavar="PRIVATE.pem",
    type=FilePath(),
    required=True,
    help="Decrypt with this private RSA key (its password: PBS_MASTER_KEY_PASSWORD, or asked for).",
)
@source_options
@logging_options
def recover(snapshot: str, out: Path, master_key: Path, log: LogOptions, source: SourceOptions) -> None:
    """Decrypt the key of SNAPSHOT with the master key, and write it to OUT.json.

    The key file has no password, so keep it where only you can read it.

    \b
    Example:
      pbsfs key recover --master-key private.pem vm/106/latest key.json
    """
    set_up_logging(log)
    source, (snapshot,) = from_mounts(source, [snapshot])
    pem = read("master key", master_key, MAX_PEM_SIZE)
    if os.path.lexists(out):
        raise OutputError(f"{out} exists; remove it, or name another file")

    async def work(tree: Tree) -> bytes:
        return await sealed_key(await find(tree, snapshot, source))

    sealed = run_on_tree(work, source=source)
    text = decrypt(sealed, pem, master_key, lambda: _master_password(master_key))
    try:
        fingerprint = fingerprint_of(KeyFile.parse(text))
    except DamageError as error:
        raise DamageError(f"the key of {snapshot}: {error}") from None
    write(out, text)
    click.echo(f"{out}: the key {printable(fingerprint or '(its fingerprint requires its password)')}")


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
