"""`pbsfs completion`: prints the script with which a shell completes commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the completion script for SHELL.

    \b
    Examples:
      pbsfs completion bash > /etc/bash_completion.d/pbsfs
      pbsfs completion zsh > ~/.zfunc/_pbsfs
      pbsfs completion fish > ~/.config/fish/completions/pbsfs.fish
    """
    from pbsfs.cli import cli  # noqa: PLC0415 - the group imports its commands, not the other way round

    completer = get_completion_class(shell)
    assert completer is not None  # the choices are those that click has
    click.echo(completer(cli, {}, "pbsfs", "_PBSFS_COMPLETE").source())
