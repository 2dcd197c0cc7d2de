"""Searching an archive by names finds what going through all of it finds, and no bytes that look alike."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbsfs.base.errors import DamageError
from pbsfs.contents import names
from pbsfs.contents.archive import Archive
from pbsfs.contents.base import Contents, Entry
from pbsfs.formats import pxar
from pbsfs.formats.pxar import HEADER
from pbsfs.testing.archives import Node, write
from tests.contents.trees import NAME, directory, file, open_tree, some
from tests.support.archives import Memory

both = pytest.mark.parametrize("split", [False, True], ids=["version 1", "version 2"])


def walked(contents: Contents, name: re.Pattern[bytes]) -> list[tuple[bytes, object]]:
    """What a search has to find."""
    return [
        (path, entry)
        for path, entry in contents.walk(contents.root)
        if not isinstance(entry, Entry) or name.fullmatch(entry.name)
    ]


def searched(contents: Contents, name: re.Pattern[bytes]) -> list[tuple[bytes, object]]:
    return list(contents.search(contents.root, name))


@both
@pytest.mark.parametrize(
    "text", [rb"[^/\0]*", rb"inner", rb"[^/\0]*a[^/\0]*", rb"(?i:FIRST)", rb"\xfe.", rb"none"]
)
def test_a_search_finds_what_a_walk_finds(split: bool, text: bytes) -> None:
    name = re.compile(text, re.DOTALL)
    contents = open_tree(some(), split=split)
    assert searched(contents, name) == walked(contents, name)
    inner = contents.child(contents.root, b"inner")
    assert inner is not None
    expected = [(p.removeprefix(b"inner/"), e) for p, e in walked(contents, name) if p.startswith(b"inner/")]
    assert list(contents.search(inner, name)) == expected


def in_order(nodes: list[Node]) -> list[Node]:
    """One node for each name, as a client writes them."""
    return sorted({node.name: node for node in nodes}.values(), key=lambda node: node.name)


NAMES = st.text("ab.", min_size=1, max_size=3).filter(lambda name: name not in (".", "..")).map(str.encode)
TREES = st.recursive(
    st.builds(file, NAMES, st.binary(max_size=20)),
    lambda children: st.builds(
        lambda name, below: directory(
            name, *sorted({n.name: n for n in below}.values(), key=lambda n: n.name)
        ),
        NAMES,
        st.lists(children, max_size=5),
    ),
    max_leaves=30,
)


@given(st.lists(TREES, max_size=4), st.sampled_from([rb"a[^/\0]*", rb"[^/\0]*", rb"b\.", rb"(?:a|b)"]))
def test_it_does_so_in_any_tree(below: list[Node], text: bytes) -> None:
    contents = open_tree(directory(b"", *in_order(below)), split=True)
    name = re.compile(text, re.DOTALL)
    assert searched(contents, name) == walked(contents, name)


def test_bytes_that_look_like_a_name_are_not_one_and_hide_none() -> None:
    mark = pxar.FILENAME.to_bytes(8, "little")
    whole = HEADER.pack(pxar.FILENAME, 21) + b"here\0"
    root = directory(
        b"",
        file(b"a", xattrs={b"user.false": whole, b"user.half": mark}),
        file(b"here", b"1"),
        Node(b"here-too", 0o120777, target=mark[:7] + b"/" + whole[:3]),
        directory(b"sub", file(b"here", b"2"), xattrs={b"user.x": whole * 3 + mark}),
    )
    contents = open_tree(root, split=True)
    found = searched(contents, re.compile(rb"here"))
    assert [path for path, _entry in found] == [b"here", b"sub/here"]


@pytest.mark.parametrize("step", [64, 100, 1000])
def test_a_name_on_the_border_of_two_steps_is_found(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    monkeypatch.setattr(names, "STEP", step)
    root = directory(b"", *(file(b"f%03d" % number, b"x") for number in range(60)))
    contents = open_tree(root, split=True)
    name = re.compile(rb"f\d*")
    assert searched(contents, name) == walked(contents, name)
    assert len(searched(contents, name)) == 60


class Damaged(Memory):
    """A stream of which some bytes cannot be read."""

    bad = range(0)

    def pread(self, offset: int, size: int) -> bytes:
        data = super().pread(offset, size)
        if offset < self.bad.stop and self.bad.start < offset + len(data):
            raise DamageError("a chunk is missing")
        return data


def test_damage_hides_no_more_from_a_search_than_from_a_walk() -> None:
    root = directory(b"", *(directory(b"d%d" % d, *(file(b"f%d" % f) for f in range(9))) for d in range(9)))
    written = write(root, split=True)
    assert written.payload is not None
    for start in range(100, len(written.main) - 300, 400):
        main = Damaged(written.main)
        contents = Archive(main, Memory(written.payload), name=NAME)
        main.bad = range(start, start + 50)
        name = re.compile(rb"f[27]")
        assert [(p, str(e)) for p, e in searched(contents, name)] == [
            (p, str(e)) for p, e in walked(contents, name)
        ]
