"""The documents: their links lead somewhere, every document can be reached from the README, and the list of
modules is complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.documents import anchors, links

CHECKOUT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*CHECKOUT.glob("*.md"), *CHECKOUT.glob("docs/**/*.md"), CHECKOUT / "bench" / "README.md"])
each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: path.relative_to(CHECKOUT).as_posix()
)


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


def test_the_architecture_names_every_module() -> None:
    listed = (CHECKOUT / "docs" / "architecture.md").read_text().split("```")[1]
    assert listed.lstrip().startswith("pbsfs/")
    modules = {path for path in (CHECKOUT / "pbsfs").rglob("*.py") if not path.stem.startswith("__")}
    commands = set((CHECKOUT / "pbsfs" / "cli").glob("*.py"))  # which the list has as one
    assert {path.stem for path in modules - commands} <= set(re.findall(r"\w+", listed))
