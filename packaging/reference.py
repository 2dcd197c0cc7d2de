"""The document that lists every command, option, parameter, key, variable and exit status, from the code.

    python packaging/reference.py [FILE]

writes it to FILE (default: docs/reference.md). A test fails if docs/reference.md differs from the code.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import commands
from variables import VARIABLES

from pbsfs.access.profiles import KEYS
from pbsfs.cli.mount_helper import FLAGS, SECRETS
from pbsfs.cli.mount_helper import OPTIONS as FSTAB
from pbsfs.fuse.options import GENERAL, OPTIONS
from pbsfs.nbd.parameters import PARAMETERS

FILE = Path(__file__).resolve().parent.parent / "docs/reference.md"

_SHARED = 4
"""An option of at least this many commands is described once, for all of them."""

_INTRODUCTION = """\
# Reference

`packaging/reference.py` writes this page from the code of pbsfs. `pbsfs COMMAND --help` and the manual pages
have the same texts.

- [Commands](#commands), and the [options that several of them have](#options-of-several-commands)
- [Mount options](#mount-options), of `pbsfs mount -o` and of fstab
- [Parameters of nbdkit's plugin](#parameters-of-nbdkits-plugin)
- [Environment variables](#environment-variables)
- [Keys of a profile](#keys-of-a-profile), in the configuration
- [Exit statuses](#exit-statuses)
"""

_VARIABLES = """\
An option takes precedence over a variable. Where a variable has forms with `_FD`, `_FILE` and `_CMD` at the
end of its name, these name a descriptor, a file or a command, whose first line is the value. Of all four, the
first that is set counts.
"""

_KEYS = """\
[configuration.md](configuration.md) says where the files are, and what a reference to a secret is.
"""


def document() -> str:
    """The text of the document."""
    pbsfs, helper = commands.pbsfs(), commands.mount_helper()
    everything = [*pbsfs.all(), helper]
    shared = _shared(everything)
    parts = [
        _INTRODUCTION,
        "## Commands\n",
        *(
            f"- [`{command.path}`](#{_anchor(command.path)}): {_text(command.summary)}"
            for command in everything
        ),
        "",
        *(_command(command, shared) for command in everything),
        "## Options of several commands\n",
        _list(shared),
        *_mount_options(pbsfs),
        "## Parameters of nbdkit's plugin\n",
        "[nbd.md](nbd.md) shows how to use them. A dash may stand for an underscore.\n",
        _list((f"{name}=", text) for name, text in PARAMETERS.items()),
        "## Environment variables\n",
        _VARIABLES,
        _list(VARIABLES.items()),
        "## Keys of a profile\n",
        _KEYS,
        _list((name, key.meaning) for name, key in KEYS.items()),
        "## Exit statuses\n",
        "Of every command but the mount helper, whose statuses are [those of mount(8)](#mountpbsfs).\n",
        _statuses(pbsfs),
    ]
    return "\n".join(parts).rstrip("\n") + "\n"


def _shared(everything: list[commands.Command]) -> list[tuple[str, str]]:
    """The options that several commands have with the same text."""
    counted = Counter(option for command in everything for option in command.options)
    return [option for option, number in counted.items() if number >= _SHARED]


def _command(command: commands.Command, shared: list[tuple[str, str]]) -> str:
    parts = [
        f"### {command.path}\n",
        f"```\n{command.path} {command.usage}\n```\n",
        *_paragraphs(command.description),
    ]
    own = [option for option in command.options if option not in shared]
    if own:
        parts.append(_list(own))
    names = [_first_name(option[0]) for option in command.options if option in shared]
    names = [name for name in names if name != "--help"]  # every command has it
    if names:
        also = "And these" if own else "These"
        named = ", ".join(f"`{name}`" for name in names)
        parts.append(
            _filled(f"{also} [options of several commands](#options-of-several-commands): {named}.") + "\n"
        )
    if command.path != "pbsfs":  # whose exit statuses have a section
        parts += _paragraphs(command.epilog)
    return "\n".join(parts)


def _first_name(names: str) -> str:
    """The long name of an option, without its value."""
    words: list[str] = re.findall(r"-[\w-]+", names)
    long = [word for word in words if word.startswith("--")]
    return (long or words)[0]


def _mount_options(pbsfs: commands.Command) -> Iterator[str]:
    mount = next(command for command in pbsfs.all() if command.path == "pbsfs mount")
    texts = {_first_name(names): text for names, text in mount.options}
    flags = [
        ("`, `".join(found), text)
        for names, text in mount.options
        if (found := [name for name in re.findall(r"--([\w-]+)", names) if name in FLAGS])
    ]
    yield "## Mount options\n"
    yield "Of `pbsfs mount -o` and of fstab:\n"
    yield _list(OPTIONS.items())
    yield "Of fstab and mount(8) only, as the options of [`pbsfs mount`](#pbsfs-mount) with two dashes:\n"
    secrets = (
        (f"{name}=", f"Take {variable} from the first line of this file.")
        for name, variable in sorted(SECRETS.items())
    )
    yield _list([*((f"{name}=", texts[f"--{name}"]) for name in sorted(FSTAB)), *flags, *secrets])
    yield (
        _filled(f"pbsfs also accepts these options of mount(8): {', '.join(f'`{o}`' for o in GENERAL)}.")
        + "\n"
    )


def _statuses(pbsfs: commands.Command) -> str:
    (lines,) = [part.kept for part in pbsfs.epilog if part.title == "Exit status"]
    rows = [line.strip().split(maxsplit=1) for line in lines]
    return "\n".join(
        ["| status | meaning |", "| --- | --- |", *(f"| {status} | {_text(text)} |" for status, text in rows)]
    )


def _paragraphs(paragraphs: Iterable[commands.Paragraph]) -> Iterator[str]:
    for paragraph in paragraphs:
        if paragraph.kept:
            title = f"{paragraph.title}:\n\n" if paragraph.title else ""
            yield f"{title}```\n" + "\n".join(paragraph.kept) + "\n```\n"
        else:
            yield _filled(_text(paragraph.text)) + "\n"


def _list(items: Iterable[tuple[str, str]]) -> str:
    return "\n".join(_filled(f"`{name}`: {_text(text)}", "- ", "  ") for name, text in items) + "\n"


def _filled(text: str, first: str = "", other: str = "") -> str:
    return textwrap.fill(
        text,
        width=120,
        initial_indent=first,
        subsequent_indent=other,
        break_long_words=False,
        break_on_hyphens=False,
    )


_CODE = re.compile(
    r"--[a-z][a-z-]*"  # an option
    r"|\b(?:PBS|PBSFS|AWS)_[A-Z0-9_]+\b|(?<!\w)_(?:FD|FILE|CMD)\b"  # a variable, or its suffix
    r"|\[\[user\S*datastore"  # the form of a repository
    r"|\[\"\S.*?\"\]"  # a list
)


def _text(text: str) -> str:
    """Text in Markdown: names as code, and nothing else that has a meaning there."""
    parts: list[str] = []
    end = 0
    for found in _CODE.finditer(text):
        parts += [_escaped(text[end : found.start()]), f"`{found[0]}`"]
        end = found.end()
    return "".join([*parts, _escaped(text[end:])])


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*<|]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def _anchor(title: str) -> str:
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


if __name__ == "__main__":
    (Path(sys.argv[1]) if sys.argv[1:] else FILE).write_text(document(), "utf-8")
