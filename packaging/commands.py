"""The commands of pbsfs and the mount helper, as data: what `--help` prints of each.

The one walk over the definitions of the commands. `manual.py` makes manual pages of it, `reference.py` a
document.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

import click

from pbsfs.cli import cli
from pbsfs.cli.mount_helper import command as helper

_KEPT_AS_IT_IS = "\b"
"""How click marks a paragraph whose lines it does not fill."""


@dataclass(frozen=True, slots=True)
class Paragraph:
    """A paragraph of a help text.

    Text as one line, or lines that stay as they are (`kept`), such as examples; those may have a `title`.
    """

    text: str = ""
    title: str | None = None
    kept: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Command:
    """A command, and those below it. `path`: the words that call it. `options`: names and text of each."""

    path: str
    summary: str
    usage: str
    description: tuple[Paragraph, ...]
    options: tuple[tuple[str, str], ...]
    epilog: tuple[Paragraph, ...]
    subcommands: tuple[Command, ...]

    def all(self) -> Iterator[Command]:
        """This command and all below it, depth first."""
        yield self
        for subcommand in self.subcommands:
            yield from subcommand.all()


def pbsfs() -> Command:
    """The command `pbsfs`."""
    return _read(cli, _context(cli, "pbsfs", None))


def mount_helper() -> Command:
    """The helper of mount(8)."""
    return _read(helper, _context(helper, "mount.pbsfs", None))


def _context(command: click.Command, name: str, parent: click.Context | None) -> click.Context:
    return click.Context(command, info_name=name, parent=parent, **command.context_settings)


def _read(command: click.Command, context: click.Context) -> Command:
    description = tuple(_paragraphs(command.help or ""))
    return Command(
        path=context.command_path,
        summary=description[0].text.rstrip("."),
        usage=" ".join(command.collect_usage_pieces(context)),
        description=description,
        options=tuple(_options(command, context)),
        epilog=tuple(_paragraphs(command.epilog or "")),
        subcommands=tuple(_subcommands(command, context)),
    )


def _options(command: click.Command, context: click.Context) -> Iterator[tuple[str, str]]:
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and isinstance(parameter, click.Option):
            names, text = record
            yield names, " ".join(text.split())


def _subcommands(command: click.Command, context: click.Context) -> Iterator[Command]:
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            subcommand = command.get_command(context, name)
            if subcommand is not None and not subcommand.hidden:
                yield _read(subcommand, _context(subcommand, name, context))


def _paragraphs(text: str) -> Iterator[Paragraph]:
    for paragraph in textwrap.dedent(text).split("\n\n"):
        if paragraph.strip().startswith(_KEPT_AS_IT_IS):
            first, *kept = paragraph.strip().removeprefix(_KEPT_AS_IT_IS).strip("\n").split("\n")
            title = first.strip()[:-1] if first.endswith(":") else None
            if title is None:
                kept.insert(0, first)
            yield Paragraph(title=title, kept=tuple(textwrap.dedent("\n".join(kept)).split("\n")))
        elif paragraph.strip():
            yield Paragraph(text=" ".join(paragraph.split()))
