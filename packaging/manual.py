"""Manual pages of pbsfs, each command and the mount helper, in man(7) format, from the texts of `--help`.

`files.py` and the tests call it. It reads nothing but the definitions of the commands.
"""

from __future__ import annotations

import textwrap

import click

from pbsfs import __version__
from pbsfs.cli import cli
from pbsfs.cli.mount_helper import command as helper

_KEPT_AS_IT_IS = "\b"
"""How click marks a paragraph whose lines it does not fill."""


def pages() -> dict[str, str]:
    """The text of each page by the name of its file, such as `man1/pbsfs-mount.1`."""
    ours = {f"man1/{name}.1": page for name, page in _pages(cli, _context(cli, "pbsfs", None))}
    ((name, page),) = _pages(helper, _context(helper, "mount.pbsfs", None), section=8)
    return {**ours, f"man8/{name}.8": page, "man8/mount.fuse.pbsfs.8": f".so man8/{name}.8\n"}


def _context(command: click.Command, name: str, parent: click.Context | None) -> click.Context:
    return click.Context(command, info_name=name, parent=parent, **command.context_settings)


def _pages(command: click.Command, context: click.Context, section: int = 1) -> list[tuple[str, str]]:
    found = [(_name(context), _page(command, context, section))]
    for subcommand, inner in _subcommands(command, context):
        found += _pages(subcommand, inner)
    return found


def _subcommands(command: click.Command, context: click.Context) -> list[tuple[click.Command, click.Context]]:
    if not isinstance(command, click.Group):
        return []
    found = []
    for name in command.list_commands(context):
        subcommand = command.get_command(context, name)
        if subcommand is not None and not subcommand.hidden:
            found.append((subcommand, _context(subcommand, name, context)))
    return found


def _name(context: click.Context) -> str:
    return context.command_path.replace(" ", "-")


def _page(command: click.Command, context: click.Context, section: int) -> str:
    name = _name(context)
    summary = _summary(command)
    usage = " ".join(command.collect_usage_pieces(context))
    lines = [
        f'.TH {_escape(name.upper())} {section} "" "pbsfs {__version__}" "pbsfs"',
        *(".nh", ".ad l"),  # no hyphens in words, which could be part of an option
        ".SH NAME",
        f"{_escape(name)} \\- {_escape(summary)}",
        ".SH SYNOPSIS",
        f"\\fB{_escape(context.command_path)}\\fR {_escape(usage)}",
        ".SH DESCRIPTION",
        *_paragraphs(command.help or summary),
    ]
    lines.append(".SH OPTIONS")
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and isinstance(parameter, click.Option):
            option, text = record
            lines += [".TP", f"\\fB{_escape(option)}\\fR", _escape(" ".join(text.split()))]
    subcommands = _subcommands(command, context)
    if subcommands:
        lines.append(".SH COMMANDS")
    for subcommand, inner in subcommands:
        lines += [".TP", f"\\fB{_escape(_name(inner))}\\fR(1)", _escape(_summary(subcommand))]
    lines += _paragraphs(command.epilog or "")
    if context.parent is not None:
        lines += [
            *(".SH EXIT STATUS", "As described in \\fBpbsfs\\fR(1)."),
            *(".SH SEE ALSO", f"\\fB{_escape(_name(context.parent))}\\fR(1)"),
        ]
    return "\n".join(lines) + "\n"


def _summary(command: click.Command) -> str:
    """The first sentence of the help text, as one line."""
    first = (command.help or "").replace(_KEPT_AS_IT_IS, "").strip().split("\n\n")[0]
    return " ".join(first.split()).rstrip(".")


def _paragraphs(text: str) -> list[str]:
    """Lines of man(7). A paragraph that is kept becomes a section if its first line ends in a colon."""
    lines: list[str] = []
    for paragraph in textwrap.dedent(text).split("\n\n"):
        if paragraph.strip().startswith(_KEPT_AS_IT_IS):
            first, *kept = paragraph.strip().removeprefix(_KEPT_AS_IT_IS).strip("\n").split("\n")
            if first.endswith(":"):
                lines.append(f".SH {_escape(first.strip()[:-1].upper())}")
            else:
                lines.append(".PP")
                kept.insert(0, first)
            block = textwrap.dedent("\n".join(kept)).split("\n")
            lines += [".nf", *map(_escape, block), ".fi"]
        elif paragraph.strip():
            lines += [".PP", _escape(" ".join(paragraph.split()))]
    return lines


def _escape(text: str) -> str:
    """Text as man(7) shows it unchanged: hyphens that can be copied, and no line that is a request."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga")
    return f"\\&{escaped}" if escaped.startswith(".") else escaped
