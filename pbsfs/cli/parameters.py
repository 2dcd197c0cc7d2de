"""Values of options and arguments: paths, seconds, numbers, and words for another program."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click


class FilePath(click.Path):
    """A path that is not empty: an unset variable must not mean the current directory."""

    def __init__(self, **options: Any) -> None:
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the path is empty.", param, ctx)
        return super().convert(value, param, ctx)


_HIDDEN = "\0"


class PassingOn(click.Command):
    """A command that passes unknown options to another program, unchanged and in their order.

    click would split words like `-nographic` into letters.
    """

    ignore_unknown_options = True

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = (f"{_HIDDEN}{w}" if w[:1] == "-" != w[1:2] and w not in ("-", "-h") else w for w in args)
        return super().parse_args(ctx, list(words))


def passed_on(words: Sequence[str]) -> list[str]:
    """The words that the command passes on, as they were given."""
    return [word.removeprefix(_HIDDEN) for word in words]


class Seconds(click.ParamType):  # type: ignore[type-arg]  # older clicks take none
    """A number of seconds: finite and not negative."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        if not 0 <= seconds < math.inf:
            self.fail(f"{value} is not a number of seconds; give one from 0 on.", param, ctx)
        return seconds


class Whole(click.ParamType):  # type: ignore[type-arg]  # older clicks take none
    """A whole number from `least` to `most`. Unlike those of click, its range is not in the help text."""

    name = "number"

    def __init__(self, least: int, most: int) -> None:
        self._least = least
        self._most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value)
        number = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1
        if not self._least <= number <= self._most:
            self.fail(f"{value} is not a whole number from {self._least} to {self._most}.", param, ctx)
        return number


SECONDS = Seconds()
