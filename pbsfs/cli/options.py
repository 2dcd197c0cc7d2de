"""What commands share: the options for the source and the log, and running on the tree of a source."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from pbsfs.access.config import Configured, configure
from pbsfs.access.options import SourceOptions, resolve, without_source
from pbsfs.access.resolve import describe
from pbsfs.access.sizes import parse_rate
from pbsfs.access.terminal import Terminal
from pbsfs.base.errors import UsageError
from pbsfs.base.secret import Secret
from pbsfs.base.text import excerpt
from pbsfs.reader.damage import ZeroedRanges
from pbsfs.runtime.logs import FORMAT_VARIABLE, FORMATS, LogOptions
from pbsfs.runtime.memory import COMMAND_OPEN_LIMIT
from pbsfs.runtime.process import ending_signals
from pbsfs.sources.server.repository import Repository

if TYPE_CHECKING:
    from pbsfs.access.description import Description
    from pbsfs.tree import Tree

F = TypeVar("F", bound=Callable[..., Any])
R = TypeVar("R")


class FilePath(click.Path):
    """A path that is not empty: an unset variable must not mean the current directory."""

    def __init__(self, **options: Any) -> None:
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the path is empty.", param, ctx)
        return super().convert(value, param, ctx)


_HIDDEN = "\0"


class PassingOn(click.Command):
    """A command that passes unknown options to another program, unchanged and in their order.

    click would split words like `-nographic` into letters.
    """

    ignore_unknown_options = True

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = (f"{_HIDDEN}{w}" if w[:1] == "-" != w[1:2] and w not in ("-", "-h") else w for w in args)
        return super().parse_args(ctx, list(words))


def passed_on(words: Sequence[str]) -> list[str]:
    """The words that the command passes on, as they were given."""
    return [word.removeprefix(_HIDDEN) for word in words]


class Seconds(click.ParamType):  # type: ignore[type-arg]  # older clicks take none
    """A number of seconds: finite and not negative."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        if not 0 <= seconds < math.inf:
            self.fail(f"{value} is not a number of seconds; give one from 0 on.", param, ctx)
        return seconds


class Whole(click.ParamType):  # type: ignore[type-arg]  # older clicks take none
    """A whole number from `least` to `most`. Unlike those of click, its range is not in the help text."""

    name = "number"

    def __init__(self, least: int, most: int) -> None:
        self._least = least
        self._most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value)
        number = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1
        if not self._least <= number <= self._most:
            self.fail(f"{value} is not a whole number from {self._least} to {self._most}.", param, ctx)
        return number


SECONDS = Seconds()


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
    for option in (
        click.option(
            "--ns", "namespace", metavar="NAMESPACE", help="Start at this namespace (or PBS_NAMESPACE)."
        ),
        click.option("--keyfd", metavar="FD", type=int, help="Read a key file from this descriptor."),
        click.option(
            "--keyfile",
            "keyfiles",
            metavar="PATH",
            type=FilePath(),
            multiple=True,
            help="Decrypt with this key file, or those in this directory; may be repeated (default: the key "
            "of proxmox-backup-client, and those of Proxmox VE and Proxmox Backup Server on this machine).",
        ),
        click.option(
            "--limit-rate",
            metavar="SIZE",
            callback=lambda _context, _parameter, value: None if value is None else parse_rate(value),
            help="Fetch at most SIZE in a second from the source, such as 50M (default: no limit).",
        ),
        click.option(
            "--connections",
            metavar="NUMBER",
            type=Whole(1, 16),
            help="Open this many connections to the server for each snapshot, 1 to 16 (default: by the round "
            "trip).",
        ),
        click.option(
            "--retry-timeout",
            metavar="SECONDS",
            type=SECONDS,
            help="Retry for this long while the server is unreachable (default: 120).",
        ),
        click.option(
            "--anonymous",
            is_flag=True,
            default=None,
            help="Read a public bucket, without an access key.",
        ),
        click.option(
            "--s3-config",
            metavar="FILE",
            type=FilePath(),
            help="Take endpoint and access key of the bucket from this s3.cfg of a Proxmox Backup Server.",
        ),
        click.option(
            "--aws-profile",
            metavar="NAME",
            help="Take the access key from this profile in the files of AWS's tools (or AWS_PROFILE).",
        ),
        click.option(
            "--path-style/--virtual-host",
            "path_style",
            default=None,
            help="Name the bucket in the path, or in the host's name (default: in the path if there is an "
            "endpoint that is not AWS's).",
        ),
        click.option("--region", metavar="REGION", help="Sign requests for this region (or AWS_REGION)."),
        click.option(
            "--endpoint",
            metavar="URL",
            help="Reach the bucket at this address, https://HOST[:PORT] (or AWS_ENDPOINT_URL_S3; default: "
            "AWS's of the region).",
        ),
        click.option(
            "--bucket",
            metavar="s3://BUCKET/DATASTORE",
            help="Read the datastore in this S3 bucket, without a server (or PBSFS_BUCKET).",
        ),
        click.option(
            "--ca-file",
            metavar="FILE",
            type=FilePath(),
            help="Trust only certificates that a CA in this PEM file signed (default: the system's CAs).",
        ),
        click.option(
            "--fingerprint",
            metavar="FINGERPRINT",
            help="Trust only the server's certificate with this SHA-256 (or PBS_FINGERPRINT).",
        ),
        click.option(
            "--datastore-dir",
            metavar="DIR",
            type=FilePath(),
            help="Read the datastore in this directory, without a server (or PBSFS_DATASTORE_DIR).",
        ),
        click.option(
            "--auth-id",
            metavar="USER@REALM[!TOKEN]",
            help="Log in to --server as this user or token (or PBS_AUTH_ID; default: root@pam).",
        ),
        click.option(
            "--datastore", metavar="NAME", help="Read this datastore of --server (or PBS_DATASTORE)."
        ),
        click.option(
            "--port",
            metavar="NUMBER",
            type=Whole(1, 65535),
            help="Connect to this port of --server (or PBS_PORT; default: 8007).",
        ),
        click.option(
            "--server",
            metavar="HOST",
            help="Read from this server, given by the parts of a repository (or PBS_SERVER; default: "
            "localhost).",
        ),
        click.option(
            "--repository",
            metavar="REPOSITORY",
            help="Read from a server: [[user@realm[!token]@]host[:port]:]datastore (or PBS_REPOSITORY).",
        ),
        click.option(
            "--profile",
            metavar="NAME",
            help="Read from the source of this profile in the configuration (or PBSFS_PROFILE; default: "
            "the profile named default, if there is one).",
        ),
    ):
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


def environment() -> Mapping[str, str]:
    """The environment of this command with its secrets, which `os.environ` lacks.

    Only within a command; see `take_secrets`.
    """
    found: Mapping[str, str] = click.get_current_context().find_root().obj
    return found


def ignore_source() -> None:
    """From now on, this command's environment lacks the source that it names, and the secrets for that."""
    root = click.get_current_context().find_root()
    root.obj = without_source(root.obj)


def run_on_tree(
    work: Callable[[Tree], Awaitable[R]],
    *,
    source: SourceOptions,
    zeroed: ZeroedRanges | None = None,
    reads_much: bool = False,
) -> R:
    """Opens the source that the options name, and runs `work` on its tree.

    `reads_much`: whether to ask for the password of a default key.

    SIGINT, SIGTERM and SIGHUP (unless it is ignored) cancel `work`, so that it cleans up, and end in
    `click.exceptions.Exit`.
    """
    return run_on_described(work, described(source, reads_much=reads_much), zeroed=zeroed)


def described(source: SourceOptions, *, reads_much: bool) -> Description:
    """The source that the options name. `reads_much`: as for `run_on_tree`."""
    return described_by(configure(source, environment()), reads_much=reads_much)


def described_by(configured: Configured, *, reads_much: bool) -> Description:
    """The same, where the caller has put a profile's settings into the options."""
    resolved = resolve(configured.options, configured.environment)
    return describe(resolved, configured.environment, find_terminal(), ask_for_default=reads_much)


def resolved_user(configured: Configured) -> tuple[SourceOptions, Repository]:
    """The resolved options of a source that a user with a password logs in to. Raises UsageError."""
    options = resolve(configured.options, configured.environment)
    if options.repository is None:
        kind = "directory" if options.bucket is None else "bucket"
        raise UsageError(f"{options.bucket or options.datastore_dir}: a {kind} needs no login; name a server")
    repository = Repository.parse(options.repository)
    if repository.token is not None:
        raise UsageError(
            f"{repository.auth_id}: an API token needs no login; give its secret to each command, or "
            "name a user"
        )
    return options, repository


def run_on_described(
    work: Callable[[Tree], Awaitable[R]], description: Description, *, zeroed: ZeroedRanges | None = None
) -> R:
    """Runs `work` on the tree of a source; see `run_on_tree`."""
    # Slow to import, and `mount`, which uses this module, does not need them.
    import trio  # noqa: PLC0415

    from pbsfs.reader.reader import open_reader  # noqa: PLC0415
    from pbsfs.tree import Tree  # noqa: PLC0415

    source = description.open()

    async def run() -> R:
        async with open_reader(
            source, open_limit=COMMAND_OPEN_LIMIT, keys=description.keys, zeroed=zeroed
        ) as reader:
            return await work(Tree(reader, description.namespace, files=True))

    return trio.run(_until_signalled, run)


class _ClickTerminal(Terminal):
    """The terminal of this process."""

    def password(self, text: str) -> Secret:
        return Secret(click.prompt(text, hide_input=True, err=True))

    def confirm(self, text: str) -> bool:
        return click.confirm(text, err=True)


def find_terminal() -> Terminal | None:
    """The terminal for questions; None if standard input is not a terminal."""
    return _ClickTerminal() if sys.stdin is not None and sys.stdin.isatty() else None


async def _until_signalled(work: Callable[[], Awaitable[R]]) -> R:
    import trio  # noqa: PLC0415

    # An exception raised by a signal handler could interrupt trio's own code.
    stopped_by: int | None = None
    outcome: R | Exception | None = None
    with trio.open_signal_receiver(*ending_signals()) as signals:
        async with trio.open_nursery() as nursery:

            async def wait_for_signal() -> None:
                nonlocal stopped_by
                async for number in signals:
                    stopped_by = stopped_by or number
                    nursery.cancel_scope.cancel()

            nursery.start_soon(wait_for_signal)
            try:
                outcome = await work()
            except Exception as error:  # raised outside, so that the nursery does not wrap it in a group
                outcome = error
            nursery.cancel_scope.cancel()
    if stopped_by is not None:
        raise click.exceptions.Exit(128 + stopped_by)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
