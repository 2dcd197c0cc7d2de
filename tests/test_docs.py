"""The documents: their links lead somewhere, and every document can be reached from the README."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*CHECKOUT.glob("*.md"), *CHECKOUT.glob("docs/**/*.md"), CHECKOUT / "bench" / "README.md"])
each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: path.relative_to(CHECKOUT).as_posix()
)


def prose(document: Path) -> str:
    """A document without its code."""
    text = re.sub(r"^ *```.*?^ *```$", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`]*`", lambda found: "`" + found[0].strip("`").replace("](", "] (") + "`", text)


def links(document: Path) -> Iterator[tuple[Path, str]]:
    """Of each link and picture that leads into the checkout: the file, and the anchor in it, or ''."""
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


@each_document
def test_links_lead_to_files_and_headings(document: Path) -> None:
    for target, anchor in links(document):
        assert target.is_relative_to(CHECKOUT), target
        assert target.exists(), f"there is no {target.relative_to(CHECKOUT)}"
        if anchor:
            assert anchor in anchors(target), f"{target.relative_to(CHECKOUT)} has no heading for #{anchor}"


def test_every_document_can_be_reached_from_the_readme() -> None:
    seen: set[Path] = set()
    new = [CHECKOUT / "README.md"]
    while new:
        document = new.pop()
        if document not in seen and document.suffix == ".md":
            seen.add(document)
            new += [target for target, _anchor in links(document)]
    assert set(DOCUMENTS) <= seen, set(DOCUMENTS) - seen


def test_documents_that_programs_name_exist() -> None:
    """Error messages, comments and units name documents by their path in the checkout."""
    named = {
        name
        for folder in ("pbsfs", "packaging", "scripts", "bench")
        for path in (CHECKOUT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so", ".svg")
        for name in re.findall(r"(?<![\w/])docs/[\w/-]+\.md", path.read_text(errors="replace"))
    }
    assert named
    assert not [name for name in named if not (CHECKOUT / name).exists()]
