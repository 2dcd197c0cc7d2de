"""What commands run on: their environment, the terminal, the source that the options name, and its tree.

A signal ends the work on a tree, which cleans up.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

import click

from pbsfs.access.config import Configured, configure
from pbsfs.access.options import SourceOptions, resolve, without_source
from pbsfs.access.resolve import describe
from pbsfs.access.terminal import Terminal
from pbsfs.base.errors import UsageError
from pbsfs.base.secret import Secret
from pbsfs.reader.damage import ZeroedRanges
from pbsfs.runtime.memory import COMMAND_OPEN_LIMIT
from pbsfs.runtime.process import ending_signals
from pbsfs.sources.server.repository import Repository

if TYPE_CHECKING:
    from pbsfs.access.description import Description
    from pbsfs.tree import Tree

R = TypeVar("R")


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
    first: str | None = None,
    zeroed: ZeroedRanges | None = None,
    reads_much: bool = False,
) -> R:
    """Opens the source that the options name, and runs `work` on its tree.

    `first`: the path that `work` looks up first. `reads_much`: whether it reads what is there, so that pbsfs
    asks for the password of a default key.

    SIGINT, SIGTERM and SIGHUP (unless it is ignored) cancel `work`, so that it cleans up, and end in
    `click.exceptions.Exit`.
    """
    description = described(source, reads_much=reads_much)
    return run_on_described(work, description, first=first, reads=reads_much, zeroed=zeroed)


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
    work: Callable[[Tree], Awaitable[R]],
    description: Description,
    *,
    first: str | None = None,
    reads: bool = True,
    zeroed: ZeroedRanges | None = None,
) -> R:
    """Runs `work` on the tree of a source; see `run_on_tree`. `reads`: whether it reads what is there."""
    # Slow to import, and `mount`, which uses this module, does not need them.
    import trio  # noqa: PLC0415

    from pbsfs.reader.reader import open_reader  # noqa: PLC0415
    from pbsfs.tree import Tree  # noqa: PLC0415
    from pbsfs.tree.expected import expected_at  # noqa: PLC0415

    source = description.open()
    if first is not None:
        source.expect(expected_at(first, description.namespace, reads=reads))

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
        await trio.lowlevel.checkpoint()  # Ctrl-C before that is raised here, not in a group of a nursery
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
