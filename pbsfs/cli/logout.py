"""`pbsfs logout`: removes what `pbsfs login` keeps."""

from __future__ import annotations

import click

from pbsfs.access.config import configure
from pbsfs.access.options import SourceOptions
from pbsfs.access.tickets import Tickets
from pbsfs.cli.options import logging_options, source_options
from pbsfs.cli.running import environment, resolved_user
from pbsfs.runtime.logs import LogOptions, set_up_logging


@click.command("logout")
@source_options
@logging_options
def command(source: SourceOptions, log: LogOptions) -> None:
    """Remove the login that pbsfs login keeps for a user of a server.

    Mounts and servers that use it keep running.

    \b
    Examples:
      pbsfs logout --repository anna@pbs@pbs.example.com:store1
      pbsfs logout --profile home
    """
    set_up_logging(log)
    configured = configure(source, environment())
    _options, repository = resolved_user(configured)
    removed = Tickets(configured.environment).remove(repository)
    state = "is logged out" if removed else "was not logged in"
    click.echo(f"{repository.user} {state} at {repository.address}.")
