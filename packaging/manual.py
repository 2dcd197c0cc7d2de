"""Manual pages of pbsfs, each command and the mount helper, in man(7) format, from the texts of `--help`.

`files.py` and the tests call it. It reads nothing but `commands.py` and `variables.py`.
"""

from __future__ import annotations

from collections.abc import Iterable

import commands
from variables import VARIABLES

from pbsfs import __version__


def pages() -> dict[str, str]:
    """The text of each page by the name of its file, such as `man1/pbsfs-mount.1`."""
    pbsfs, helper = commands.pbsfs(), commands.mount_helper()
    return {
        **{f"man1/{_name(command)}.1": _page(command, main=pbsfs) for command in pbsfs.all()},
        f"man8/{helper.path}.8": _page(helper, section=8),
        "man8/mount.fuse.pbsfs.8": f".so man8/{helper.path}.8\n",
    }


def _name(command: commands.Command) -> str:
    return command.path.replace(" ", "-")


def _page(command: commands.Command, *, main: commands.Command | None = None, section: int = 1) -> str:
    name = _name(command)
    lines = [
        f'.TH {_escape(name.upper())} {section} "" "pbsfs {__version__}" "pbsfs"',
        *(".nh", ".ad l"),  # no hyphens in words, which could be part of an option
        ".SH NAME",
        f"{_escape(name)} \\- {_escape(command.summary)}",
        ".SH SYNOPSIS",
        f"\\fB{_escape(command.path)}\\fR {_escape(command.usage)}",
        ".SH DESCRIPTION",
        *_paragraphs(command.description),
        ".SH OPTIONS",
        *_list(command.options),
    ]
    if command.subcommands:
        lines.append(".SH COMMANDS")
    for subcommand in command.subcommands:
        lines += [".TP", f"\\fB{_escape(_name(subcommand))}\\fR(1)", _escape(subcommand.summary)]
    if command is main:
        lines += [".SH ENVIRONMENT", *_list(VARIABLES.items())]
    lines += _paragraphs(command.epilog)
    if main is not None and command is not main:
        parent = command.path.rpartition(" ")[0].replace(" ", "-")
        lines += [
            *(".SH EXIT STATUS", "As described in \\fBpbsfs\\fR(1)."),
            *(".SH SEE ALSO", f"\\fB{_escape(parent)}\\fR(1)"),
        ]
    return "\n".join(lines) + "\n"


def _list(items: Iterable[tuple[str, str]]) -> list[str]:
    """Names, such as options, each with its text."""
    return [line for name, text in items for line in (".TP", f"\\fB{_escape(name)}\\fR", _escape(text))]


def _paragraphs(paragraphs: Iterable[commands.Paragraph]) -> list[str]:
    """Lines of man(7). A paragraph with a title becomes a section."""
    lines: list[str] = []
    for paragraph in paragraphs:
        lines.append(f".SH {_escape(paragraph.title.upper())}" if paragraph.title else ".PP")
        if paragraph.kept:
            lines += [".nf", *map(_escape, paragraph.kept), ".fi"]
        else:
            lines.append(_escape(paragraph.text))
    return lines


def _escape(text: str) -> str:
    """Text as man(7) shows it unchanged: hyphens that can be copied, and no line that is a request."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga")
    return f"\\&{escaped}" if escaped.startswith(".") else escaped
