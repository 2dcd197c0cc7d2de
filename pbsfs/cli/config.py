"""`pbsfs config`: shows the configuration, checks it step by step, and writes a first profile."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import click

from pbsfs.access.config import Configuration, directories, read_configuration
from pbsfs.access.profiles import NAME, shown_settings
from pbsfs.base.errors import PbsfsError, UsageError, exit_status_of
from pbsfs.base.text import one_line, printable, quoted
from pbsfs.cli.config_check import Outcome, ProfileCheck
from pbsfs.cli.config_init import ask, write
from pbsfs.cli.running import environment, find_terminal
from pbsfs.runtime.logs import LogOptions, set_up_logging


@click.group("config", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Show and check the configuration, and write a first profile.

    \b
    Examples:
      pbsfs config init
      pbsfs config check home
      pbsfs config show
    """


@command.command("show", short_help="Print the settings of a profile, or all profiles.")
@click.argument("profile", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def show(profile: str | None, as_json: bool) -> None:
    """Print the settings of PROFILE, or the files that were read and all profiles.

    Of a secret, pbsfs shows only where it is.

    \b
    Examples:
      pbsfs config show
      pbsfs config show home
    """
    configuration = read_configuration(environment())
    names = list(configuration.tables) if profile is None else [profile]
    found = {name: _settings(configuration, name, strict=profile is not None) for name in names}
    if as_json:
        files = [str(file) for file in configuration.files]
        content = {"files": files, "profiles": found} if profile is None else found[profile]
        click.echo(json.dumps(content, indent=2))
        return
    if profile is None:
        for file in configuration.files:
            click.echo(f"{'file:':<15}{printable(str(file))}")
        if not found:
            click.echo("There is no profile; pbsfs config init writes a first one.")
    for name, settings in found.items():
        click.echo(f"\n[profiles.{name}]" if profile is None else f"[profiles.{name}]")
        width = max(15, *(len(key) + 2 for key in settings))
        for key, value in settings.items():
            text = ", ".join(value) if isinstance(value, list) else value
            click.echo(f"{key + ':':<{width}}{printable(text)}")


def _settings(configuration: Configuration, name: str, *, strict: bool) -> dict[str, str | list[str]]:
    """The settings of a profile. One that is not valid has its error instead, unless `strict`."""
    try:
        return shown_settings(configuration.profile(name))
    except UsageError as error:
        if strict:
            raise
        return {"error": str(error)}


@command.command("check", short_help="Try profiles step by step.")
@click.argument("profile", required=False)
def check_command(profile: str | None) -> None:
    """Go through each step from the files to the backups with PROFILE (default: all profiles).

    pbsfs prints one line for each step, and what to do where one fails. The exit status is that of the
    first failure.

    \b
    Examples:
      pbsfs config check
      pbsfs config check home
    """
    set_up_logging(LogOptions("error"))  # the steps report what would be a warning
    try:
        configuration = read_configuration(environment())
    except PbsfsError as error:
        _print(Outcome("files", str(error), error))
        raise click.exceptions.Exit(exit_status_of(error)) from None
    for file in configuration.files:
        _print(Outcome("file", str(file)))
    for file in configuration.skipped:
        _print(Outcome("file", f"{file}: this user may not read it; pbsfs skips it", is_warning=True))
    names = list(configuration.tables) if profile is None else [profile]
    if not names:
        raise UsageError("the configuration has no profile; write one with pbsfs config init")
    status = 0
    for name in names:
        for outcome in ProfileCheck(configuration, name, environment(), find_terminal()).run():
            _print(outcome)
            if outcome.failure is not None:
                status = status or exit_status_of(outcome.failure)
    if status:
        raise click.exceptions.Exit(status)


def _print(outcome: Outcome) -> None:
    mark = "FAILED " if outcome.failure is not None else "warning" if outcome.is_warning else "ok     "
    click.echo(f"{mark} {outcome.step + ':':<13} {one_line(outcome.text)}")


@command.command("init", short_help="Ask for a source, and write a profile.")
@click.argument("profile", default="default")
def init(profile: str) -> None:
    """Ask for the settings of a source, and write them as PROFILE.

    Without PROFILE, it is the one named default: commands that name no other source use that.

    The first profile goes to config.toml in your directory of settings, another one to a file of its own
    beside it, in conf.d. Only you can read the files. pbsfs asks before it replaces a file.

    \b
    Examples:
      pbsfs config init
      pbsfs config init work
    """
    if not NAME.fullmatch(profile):
        raise UsageError(
            f"{quoted(profile)} is not the name of a profile; use letters, digits, '.', '_' and '-'"
        )
    terminal = find_terminal()
    if terminal is None:
        raise UsageError("config init asks questions; run it at a terminal")
    file = _new_file(profile, environment())
    answers = ask(profile, environment(), terminal)
    for path in write(profile, answers, file, terminal):
        click.echo(f"Written: {path}", err=True)
    click.echo(f"Check it with: pbsfs config check {profile}", err=True)


def _new_file(profile: str, environment: Mapping[str, str]) -> Path:
    """The file for a new profile. Raises UsageError if the user has one of that name."""
    places = directories(environment)
    if len(places) < 2:
        raise UsageError("this user has no home directory; set XDG_CONFIG_HOME to a directory for settings")
    directory = places[-1]
    configuration = read_configuration(environment)
    if profile in configuration:
        existing = configuration.tables[profile][0]
        if existing.is_relative_to(directory):
            raise UsageError(f"profile {quoted(profile)} exists in {existing}; edit it, or name another one")
    first = directory / "config.toml"
    return directory / "conf.d" / f"{profile}.toml" if os.path.lexists(first) else first
