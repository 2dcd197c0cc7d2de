"""`pbsfs login`: logs in at a server once, for the commands of the next two hours."""

from __future__ import annotations

import click

from pbsfs.access.config import configure
from pbsfs.access.login import log_in
from pbsfs.access.options import SourceOptions
from pbsfs.access.resolve import ask_password, given_password, trust_of
from pbsfs.access.tickets import Tickets
from pbsfs.cli.options import logging_options, source_options
from pbsfs.cli.running import environment, find_terminal, resolved_user
from pbsfs.runtime.logs import LogOptions, set_up_logging
from pbsfs.sources.http.proxy import find_proxy


@click.command("login")
@source_options
@logging_options
def command(source: SourceOptions, log: LogOptions) -> None:
    """Log in as a user with a password, and keep the login for two hours.

    pbsfs asks for the password, and for a code of the authenticator app or a recovery code if the user has a
    second factor. Commands use the login if no other password is given for the same user and server. pbsfs
    keeps the ticket, and no password, in the runtime directory, where only you can read it.

    \b
    Examples:
      pbsfs login --repository anna@pbs@pbs.example.com:store1
      pbsfs login --profile home
    """
    set_up_logging(log)
    configured = configure(source, environment())
    options, repository = resolved_user(configured)
    terminal = find_terminal()
    proxy = find_proxy(repository, configured.environment)
    trust = trust_of(options, repository, proxy, configured.environment, terminal)
    password = given_password(options, configured.environment) or ask_password(repository, terminal)
    ticket = log_in(repository, password, trust, proxy, terminal)
    login = Tickets(configured.environment).save(repository, ticket)
    click.echo(f"{login.user} is logged in at {login.address} until {login.until_text}.")
