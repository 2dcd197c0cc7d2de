"""DEST of `pbsfs export`: what its name says, and the mode of the file there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import click

from pbsfs.cli.parameters import FilePath

ARCHIVE_NAMES = {".tar": "tar", ".tar.zst": "tar --zstd", ".tzst": "tar --zstd", ".zip": "zip"}
"""How the names of archives end, and the value of --format for them, with what else they require."""

COMPRESSED_NAMES = {
    ".tar.gz": "gzip",
    ".tgz": "gzip",
    ".tar.xz": "xz",
    ".txz": "xz",
    ".tar.bz2": "bzip2",
    ".tbz2": "bzip2",
    ".tar.lz4": "lz4",
}
"""The same for archives that pbsfs does not compress, and the program that does."""


class Destination(FilePath):
    """A path as it was typed: a slash at its end says that it is a directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        super().convert(value, param, ctx)
        return value


class Mode(click.ParamType):  # type: ignore[type-arg]  # older clicks take none
    """A mode in octal digits, as in chmod(1): 640, 0640."""

    name = "mode"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if not re.fullmatch("0?[0-7]{3}", value):
            self.fail(f"{value!r} is not a mode; give three octal digits, as 640", param, ctx)
        return int(value, 8)


def meant_by(dest: str, names: Mapping[str, str]) -> str | None:
    """What one of `names` means, if `dest` ends with it; otherwise None."""
    return next((meant for end, meant in names.items() if dest.lower().endswith(end)), None)
