"""The options that commands share: for the source, for damage and for the log."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from pbsfs.access.caching import parse_disk_size
from pbsfs.access.options import SourceOptions
from pbsfs.access.sizes import parse_rate
from pbsfs.base.text import excerpt
from pbsfs.cli.parameters import SECONDS, FilePath, Whole
from pbsfs.reader.damage import ZeroedRanges
from pbsfs.runtime.logs import FORMAT_VARIABLE, FORMATS, LogOptions

F = TypeVar("F", bound=Callable[..., Any])

_SOURCE_OPTIONS = (
    click.option(
        "--profile",
        metavar="NAME",
        help="Read from the source of this profile in the configuration (or PBSFS_PROFILE; default: "
        "the profile named default, if there is one).",
    ),
    click.option(
        "--repository",
        metavar="REPOSITORY",
        help="Read from a server: [[user@realm[!token]@]host[:port]:]datastore (or PBS_REPOSITORY).",
    ),
    click.option(
        "--server",
        metavar="HOST",
        help="Read from this server, given by the parts of a repository (or PBS_SERVER; default: localhost).",
    ),
    click.option(
        "--port",
        metavar="NUMBER",
        type=Whole(1, 65535),
        help="Connect to this port of --server (or PBS_PORT; default: 8007).",
    ),
    click.option("--datastore", metavar="NAME", help="Read this datastore of --server (or PBS_DATASTORE)."),
    click.option(
        "--auth-id",
        metavar="USER@REALM[!TOKEN]",
        help="Log in to --server as this user or token (or PBS_AUTH_ID; default: root@pam).",
    ),
    click.option(
        "--datastore-dir",
        metavar="DIR",
        type=FilePath(),
        help="Read the datastore in this directory, without a server (or PBSFS_DATASTORE_DIR).",
    ),
    click.option(
        "--fingerprint",
        metavar="FINGERPRINT",
        help="Trust only the certificate with this SHA-256 (or, of a server, PBS_FINGERPRINT).",
    ),
    click.option(
        "--ca-file",
        metavar="FILE",
        type=FilePath(),
        help="Trust only certificates that a CA in this PEM file signed (default: the system's CAs).",
    ),
    click.option(
        "--bucket",
        metavar="s3://BUCKET/DATASTORE",
        help="Read the datastore in this S3 bucket, without a server (or PBSFS_BUCKET).",
    ),
    click.option(
        "--endpoint",
        metavar="URL",
        help="Reach the bucket at this address, https://HOST[:PORT] (or AWS_ENDPOINT_URL_S3; default: "
        "AWS's of the region).",
    ),
    click.option("--region", metavar="REGION", help="Sign requests for this region (or AWS_REGION)."),
    click.option(
        "--path-style/--virtual-host",
        "path_style",
        default=None,
        help="Name the bucket in the path, or in the host's name (default: in the path if there is an "
        "endpoint that is not AWS's).",
    ),
    click.option(
        "--aws-profile",
        metavar="NAME",
        help="Take the access key from this profile in the files of AWS's tools (or AWS_PROFILE).",
    ),
    click.option(
        "--s3-config",
        metavar="FILE",
        type=FilePath(),
        help="Take endpoint and access key of the bucket from this s3.cfg of a Proxmox Backup Server.",
    ),
    click.option(
        "--anonymous",
        is_flag=True,
        default=None,
        help="Read a public bucket, without an access key.",
    ),
    click.option(
        "--retry-timeout",
        metavar="SECONDS",
        type=SECONDS,
        help="Retry for this long while the server is unreachable (default: 120).",
    ),
    click.option(
        "--connections",
        metavar="NUMBER",
        type=Whole(1, 16),
        help="Open this many connections to the server for each snapshot, 1 to 16 (default: by the round "
        "trip).",
    ),
    click.option(
        "--limit-rate",
        metavar="SIZE",
        callback=lambda _context, _parameter, value: None if value is None else parse_rate(value),
        help="Fetch at most SIZE in a second from the source, such as 50M (default: no limit).",
    ),
    click.option(
        "--cache-dir",
        metavar="DIR",
        type=FilePath(readable=False),
        help="Keep what was fetched in this directory, which several programs may share (or "
        "PBSFS_CACHE_DIR; default: nowhere).",
    ),
    click.option(
        "--cache-disk-size",
        metavar="SIZE",
        callback=lambda _context, _parameter, value: None if value is None else parse_disk_size(value),
        help="Use at most SIZE of the disk for --cache-dir (or PBSFS_CACHE_DISK_SIZE; default: 50G).",
    ),
    click.option(
        "--offline",
        is_flag=True,
        help="Do not ask the source: read only what --cache-dir holds.",
    ),
    click.option(
        "--keyfile",
        "keyfiles",
        metavar="PATH",
        type=FilePath(),
        multiple=True,
        help="Decrypt with this key file, or those in this directory; may be repeated (default: the key "
        "of proxmox-backup-client, and those of Proxmox VE and Proxmox Backup Server on this machine).",
    ),
    click.option("--keyfd", metavar="FD", type=int, help="Read a key file from this descriptor."),
    click.option(
        "--ns", "namespace", metavar="NAMESPACE", help="Start at this namespace (or PBS_NAMESPACE)."
    ),
)
"""In the order of the help."""


def source_options(command: F) -> F:
    """The options for the source, the same for every command that reads.

    The command gets them as one argument, `source` (SourceOptions).
    """
    names = [field.name for field in fields(SourceOptions)]  # some are only for profiles

    @functools.wraps(command)
    def with_source(*args: Any, **given: Any) -> Any:
        source = SourceOptions(**{name: given.pop(name) for name in names if name in given})
        return command(*args, source=source, **given)

    wrapped: Callable[..., Any] = with_source
    for option in reversed(_SOURCE_OPTIONS):
        wrapped = option(wrapped)
    return cast("F", wrapped)


def damage_option(command: F) -> F:
    """`--on-damage`, as the argument `on_damage`: ZeroedRanges that record zeros, or None to fail."""
    return click.option(
        "--on-damage",
        type=click.Choice(["fail", "zero"]),
        default="fail",
        callback=lambda _context, _parameter, value: ZeroedRanges() if value == "zero" else None,
        help="Fail reads of damaged data, or return zeros and report their ranges (default: fail).",
    )(command)


def logging_options(command: F) -> F:
    """`--log-level`, `--log-file` and `--log-format`, as one argument, `log` (LogOptions)."""

    @functools.wraps(command)
    def with_log(
        *args: Any, log_level: str, log_file: Path | None, log_format: str | None, **given: Any
    ) -> Any:
        return command(*args, log=LogOptions(log_level, log_file, log_format), **given)

    wrapped: Callable[..., Any] = log_format_option(with_log)
    for option in (
        click.option(
            "--log-file",
            metavar="FILE",
            type=FilePath(dir_okay=False),
            help="Append the log to this file (default: standard error; a background mount: syslog).",
        ),
        click.option(
            "--log-level",
            type=click.Choice(["debug", "info", "warning", "error"], case_sensitive=False),
            default="warning",
            help="Log messages of at least this level (default: warning).",
        ),
    ):
        wrapped = option(wrapped)
    return cast("F", wrapped)


class _LogFormat(click.Choice[str]):
    """A format of the log; the error names the variable too."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value not in FORMATS:
            self.fail(
                f"'{excerpt(value)}' is not {' or '.join(FORMATS)}; correct it or {FORMAT_VARIABLE}.",
                param,
                ctx,
            )
        return value


def log_format_option(command: F) -> F:
    """`--log-format`, for commands whose log always goes to standard error."""
    return click.option(
        "--log-format",
        type=_LogFormat(FORMATS),
        envvar=FORMAT_VARIABLE,
        help="Log lines of text, or one JSON object per line (or PBSFS_LOG_FORMAT; default: text).",
    )(command)
