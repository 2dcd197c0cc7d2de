"""The links in documents, which are Markdown as GitHub shows it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path


def prose(document: Path) -> str:
    """A document without its code."""
    text = re.sub(r"^ *```.*?^ *```$", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`]*`", lambda found: "`" + found[0].strip("`").replace("](", "] (") + "`", text)


def links(document: Path) -> Iterator[tuple[Path, str]]:
    """Of each link and picture that leads to a file: the file, and the anchor in it, or ''."""
    for target in re.findall(r"\]\(([^)\s]+)\)|<img [^>]*?src=\"([^\"]+)\"", prose(document)):
        path, _, anchor = (target[0] or target[1]).partition("#")
        if not re.match(r"[a-z]+:", path):
            yield (document.parent / path).resolve() if path else document, anchor


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a document."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*?) *$", prose(document), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        number = 0
        while (name := f"{anchor}-{number}" if number else anchor) in found:
            number += 1
        found.add(name)
    return found
