"""`mount.pbsfs`: the helper that mount(8) runs for lines of fstab, and for `mount -t pbsfs`.

mount(8) calls `mount.pbsfs SOURCE DIR [-sfnv] [-N namespace] [-o options] [-t type]` (its manual page,
EXTERNAL HELPERS). This module turns that into the words of `pbsfs mount`, which does all the rest.
`mount.fuse.pbsfs` is the same program: mount(8) looks for it with `-t fuse.pbsfs`.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping
from typing import NoReturn

import click

from pbsfs.access.config import source_of
from pbsfs.access.credentials import (
    ACCESS_KEY_VARIABLE,
    FORMS,
    KEY_PASSWORD_VARIABLE,
    PASSWORD_VARIABLE,
    SECRET_KEY_VARIABLE,
)
from pbsfs.access.options import names_server, without_source
from pbsfs.base.errors import UsageError
from pbsfs.cli import cli
from pbsfs.cli import main as run
from pbsfs.fuse.options import FuseOptions, split_options

OPTIONS = (
    *("ns", "keyfile", "fingerprint", "connections", "retry-timeout", "limit-rate"),
    *("ca-file", "endpoint", "region", "aws-profile", "s3-config"),
    *("cache-dir", "cache-disk-size"),
    *("cache-size", "refresh", "on-damage", "log-level", "log-file", "log-format", "metrics"),
)
"""Options of `pbsfs mount` that a line of fstab may have, without their dashes."""

FLAGS = ("path-style", "virtual-host", "anonymous", "offline")
"""The same, without a value."""

SECRETS = {
    "password-file": PASSWORD_VARIABLE,
    "key-password-file": KEY_PASSWORD_VARIABLE,
    "access-key-file": ACCESS_KEY_VARIABLE,
    "secret-key-file": SECRET_KEY_VARIABLE,
}
"""Options that name the file of a secret, and the variable that has the secret."""

_NO_SECRETS = {
    "password": "password-file",
    "passwd": "password-file",
    "pass": "password-file",
    "secret": "password-file",
    "token-secret": "password-file",
    "key-password": "key-password-file",
    "encryption-password": "key-password-file",
    "access-key": "access-key-file",
    "secret-key": "secret-key-file",
}
"""Options that would show a secret to everybody, and those to use instead."""

_TYPES = ("pbsfs", "fuse.pbsfs")

_WRONG_USAGE, _INTERRUPTED, _FAILED = 1, 8, 32
"""The exit statuses of mount(8), which returns that of its helper."""


_EPILOG = f"""\
\b
Exit status:
  0   done
  {_WRONG_USAGE}   wrong usage
  {_INTERRUPTED}   Ctrl-C
  {_FAILED}  not mounted
"""


@click.command("mount.pbsfs", epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source")
@click.argument("directory")
@click.option("-o", "options", metavar="OPTIONS", multiple=True, help="Set these options, as in fstab.")
@click.option("-t", "kind", metavar="TYPE", help="Mount this type: pbsfs, or fuse.pbsfs.")
@click.option("-f", "fake", is_flag=True, help="Check the options, and mount nothing.")
@click.option("-s", "sloppy", is_flag=True, help="Do nothing: unknown options are refused.")
@click.option("-n", "no_table", is_flag=True, help="Do nothing: the kernel keeps the mount table.")
@click.option("-v", "verbose", is_flag=True, help="Do nothing: the log shows the details.")
@click.option("-N", "namespace", metavar="NAMESPACE", hidden=True)
@click.pass_context
def command(
    context: click.Context,
    source: str,
    directory: str,
    options: tuple[str, ...],
    kind: str | None,
    fake: bool,
    sloppy: bool,
    no_table: bool,
    verbose: bool,
    namespace: str | None,
) -> None:
    """Mount SOURCE at DIRECTORY, as mount(8) does for the type pbsfs.

    \b
    Example of a line in fstab:
      home:files/host/web1  /mnt/web1  pbsfs  noauto,user,_netdev  0  0
    """
    if namespace is not None:
        raise UsageError("-N: not supported; enter the namespace with nsenter --mount, and mount there")
    if kind is not None and kind not in _TYPES:
        raise UsageError(f"-t {kind}: not a type of pbsfs; use {' or '.join(_TYPES)}")
    words, files = translated(source, options)
    if names_server(context.obj):
        context.obj = without_source(context.obj)  # a line of fstab means the same for everybody
    variables = _with_secrets(context.obj, files)
    if fake:
        source_of(source, variables)
        return
    arguments = ["mount", *words, "--", source, directory]
    with cli.make_context("pbsfs", arguments, obj=variables) as mounting:
        cli.invoke(mounting)


def translated(source: str, options: tuple[str, ...]) -> tuple[list[str], Mapping[str, str]]:
    """The options of `pbsfs mount` that mean the same as these options of fstab, and the files of secrets.

    The files are by the variable that names the secret (`PBS_PASSWORD`). `source` becomes the name in the
    mount table: mount(8) compares that with fstab. Raises UsageError.
    """
    words, files = [], {}
    passed_on = ["fsname=" + source.replace("\\", "\\\\").replace(",", "\\,")] if source else []
    for option in split_options(options):
        given, _equals, value = option.partition("=")
        name = given.replace("_", "-")
        if name.lower() in _NO_SECRETS:
            raise UsageError(
                f"mount option {given}=: other users can read it; give the file that holds the secret "
                f"with {_NO_SECRETS[name.lower()]}="
            )
        if name in OPTIONS or name in SECRETS:
            if not value:
                raise UsageError(f"mount option {given}: has no value; write {given}=VALUE")
            if name in OPTIONS:
                words.append(f"--{name}={value}")
            else:
                files[SECRETS[name]] = value
        elif name in FLAGS and not value:
            words.append(f"--{name}")
        elif option != "rw":  # mount(8) adds it where nobody wrote ro
            passed_on.append(option)
    FuseOptions.parse(passed_on, [*(f"{name}=" for name in (*SECRETS, *OPTIONS)), *FLAGS])
    return [*words, *(f"-o{option}" for option in passed_on)], files


def _with_secrets(environment: Mapping[str, str], files: Mapping[str, str]) -> Mapping[str, str]:
    """`environment`, in which these files and nothing else name these secrets."""
    instead = {variable + form for variable in files for form in FORMS}
    kept = {name: value for name, value in environment.items() if name not in instead}
    return kept | {f"{variable}_FILE": file for variable, file in files.items()}


def main() -> NoReturn:
    """Runs the helper, and ends the process with an exit status of mount(8)."""
    try:
        run(command)
    except SystemExit as ended:
        sys.exit(status_of(ended.code))


def status_of(code: object) -> int:
    """The exit status of mount(8) for one of pbsfs."""
    if code in (0, None):
        return 0
    if code == UsageError.exit_status:
        return _WRONG_USAGE
    return _INTERRUPTED if code == 128 + signal.SIGINT else _FAILED
