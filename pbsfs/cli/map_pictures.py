"""The pictures of `pbsfs map`: what a cell of a picture shows, and the files with them. Pure functions."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from xml.sax.saxutils import escape

from pbsfs.base.text import printable, size_text
from pbsfs.tasks.mapping import Cell, ImageMap

MOST_CELLS = 128 * 96
"""Cells of a picture in a file."""

WIDTH = 1024
"""Pixels of a line of cells: a power of two."""

LEAST_COLUMNS = 16
"""Cells of a line at least, for small images."""

_STYLE = 'font-family="sans-serif" font-size="12"'

LEAST = 4096
"""Bytes of a cell at least."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a cell shows: as a character, as an ASCII letter, in a colour of a terminal and in one of a file.

    `words`: what the legend says, of the totals of the image and the snapshot that it was compared with.
    """

    character: str
    letter: str
    colour: str
    rgb: int
    words: Callable[[Cell, str | None], str]


def _share(part: int, of: Cell) -> str:
    return f"{size_text(part)} ({100 * part // of.length if of.length else 0}%)"


DATA = Kind("█", "#", "blue", 0x2F6DB5, lambda total, _since: f"data: {_share(total.data, total)}")
SOME = Kind("▄", "-", "cyan", 0x9CC3EB, lambda _total, _since: "less than half of it is data")
HOLE = Kind(
    "·",
    ".",
    "bright_black",
    0xE3E3E3,
    lambda total, _since: f"hole: {_share(total.length - total.data, total)}",
)
CHANGED = Kind(
    "+",
    "+",
    "yellow",
    0xF0A30A,
    lambda total, since: f"changed since {since}: {_share(total.changed, total)}",
)
DAMAGED = Kind("!", "!", "red", 0xC4161C, lambda total, _since: f"damaged: {_share(total.damaged, total)}")

KINDS = (DATA, SOME, HOLE, CHANGED, DAMAGED)
"""All kinds, in the order of the legend."""


def kind_of(cell: Cell) -> Kind:
    """What is shown of a cell: the worst that is in it, and any change."""
    if cell.damaged:
        return DAMAGED
    if cell.changed:
        return CHANGED
    if not cell.data:
        return HOLE
    return DATA if 2 * cell.data >= cell.length else SOME


def cell_size(found: ImageMap, most: int) -> int:
    """The bytes of a cell, so that an image takes `most` cells at most: a power of two; a chunk at least."""
    size = found.index.chunk_size or LEAST
    while size * most < found.size:
        size *= 2
    return size


@dataclass(frozen=True, slots=True)
class _Grid:
    """The cells of a picture, by line. `size`: bytes of a cell. `side`: pixels of its side."""

    size: int
    side: int
    lines: list[list[Kind]]

    @classmethod
    def of(cls, found: ImageMap) -> _Grid:
        size = cell_size(found, MOST_CELLS)
        kinds = [kind_of(cell) for cell in found.cells(size)]
        columns = LEAST_COLUMNS
        while columns * columns * 3 < len(kinds) * 4:  # at most three quarters as high as wide
            columns *= 2
        lines = [kinds[start : start + columns] for start in range(0, len(kinds), columns)]
        return cls(size, WIDTH // columns, lines)


def svg(found: ImageMap, title: str, since: str | None) -> bytes:
    """The picture as an SVG, with offsets and a legend."""
    grid = _Grid.of(found)
    side, lines = grid.side, grid.lines
    used = [kind for kind in KINDS if any(kind in line for line in lines)]
    left, top = 80, 40
    width, height = left + WIDTH + 16, top + len(lines) * side + 16 + 20 * len(used)
    name = escape(printable(title))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" viewBox="0 0 {width} {height}" {_STYLE}>',
        f"<title>{name}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="16" y="24">{name}: {size_text(found.size)}, one square is {size_text(grid.size)}</text>',
    ]
    for row, line in enumerate(lines):
        y, x = top + row * side, left
        if row * side % 32 == 0:
            offset = size_text(row * len(lines[0]) * grid.size)
            parts.append(f'<text x="{left - 8}" y="{y + 10}" text-anchor="end">{offset}</text>')
        for kind, run in groupby(line):
            length = len(list(run)) * side
            parts.append(f'<rect x="{x}" y="{y}" width="{length}" height="{side}" fill="#{kind.rgb:06x}"/>')
            x += length
    for number, kind in enumerate(used):
        y = top + len(lines) * side + 16 + 20 * number
        words = escape(printable(kind.words(found.totals, since)))
        parts.append(f'<rect x="{left}" y="{y}" width="12" height="12" fill="#{kind.rgb:06x}"/>')
        parts.append(f'<text x="{left + 20}" y="{y + 11}">{words}</text>')
    return ("\n".join([*parts, "</svg>"]) + "\n").encode()


def png(found: ImageMap, title: str, since: str | None) -> bytes:
    """The picture as a PNG of squares, without text; the title is in its metadata.

    Source of the format: the PNG specification (ISO/IEC 15948): 8 bits for each pixel, of a palette.
    """
    grid = _Grid.of(found)
    number = {kind: place for place, kind in enumerate(KINDS, 1)}
    palette = b"\xff\xff\xff" + b"".join(kind.rgb.to_bytes(3) for kind in KINDS)
    pixels = bytearray()
    for line in grid.lines or [[]]:
        row = b"".join(bytes([number[kind]]) * grid.side for kind in line).ljust(WIDTH, b"\0")
        pixels += (b"\0" + row) * grid.side  # each line of pixels has a filter before it: none
    head = struct.pack(">IIBBBBB", WIDTH, max(len(grid.lines), 1) * grid.side, 8, 3, 0, 0, 0)
    text = b"Title\0" + printable(title).encode("latin-1", errors="replace")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (
            _part(b"IHDR", head),
            _part(b"PLTE", palette),
            _part(b"tEXt", text),
            _part(b"IDAT", zlib.compress(bytes(pixels), 9)),
            _part(b"IEND", b""),
        )
    )


def _part(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
