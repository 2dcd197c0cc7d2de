"""The messages in docs/troubleshooting.md, in whose text `…` stands for what differs."""

from __future__ import annotations

import re
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "troubleshooting.md"
HOLE = "…"
ROW = re.compile(r"^\| (`.*`) \| ([0-9, ]*) ?\| .+ \|$", re.MULTILINE)


def fragments(message: str) -> list[str]:
    """The parts between the holes, with the punctuation and the spaces beside them."""
    return [part for part in message.split(HOLE) if part.strip()]


def is_in(message: str, text: str) -> bool:
    """Whether all that is literal in `message` is in `text`, in this order."""
    end = 0
    for part in fragments(message):
        end = text.find(part, end)
        if end < 0:
            return False
        end += len(part)
    return True


def documented() -> list[tuple[str, set[int]]]:
    """The messages in the tables, each with its exit statuses."""
    rows = [
        (message, {int(number) for number in re.findall(r"\d+", statuses)})
        for cell, statuses in ROW.findall(DOCUMENT.read_text())
        for message in re.findall(r"`([^`]+)`", cell)
    ]
    assert len(rows) > 150
    return rows


def is_documented(message: str, status: int) -> bool:
    """Whether a line of the document has this message, or a more general one, and the exit status."""
    for line in DOCUMENT.read_text().splitlines():
        if re.search(rf"\b{status}\b", line):
            quoted = re.findall(r"`([^`]+)`", line)
            if any(is_in(message, one) or (len(one) > 8 and is_in(one, message)) for one in quoted):
                return True
    return False
