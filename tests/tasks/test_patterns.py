"""Patterns choose entries as the vendor's client does with the same ones."""

from __future__ import annotations

import stat

import pytest

from pbsfs.base.errors import UsageError
from pbsfs.contents.archive import Archive
from pbsfs.contents.base import Entry, Found
from pbsfs.tasks.patterns import Pattern, Selection
from pbsfs.testing.archives import Node, write
from tests.support.archives import Memory


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("log", "log", True),
        ("log", "var/log", True),
        ("log", "var/log/syslog", False),
        ("log", "catalog", False),
        ("var/log", "var/log", True),
        ("var/log", "srv/var/log", True),
        ("/var/log", "var/log", True),
        ("/var/log", "srv/var/log", False),
        ("/log", "var/log", False),
        ("*.log", "var/a.log", True),
        ("/*.log", "var/a.log", False),
        ("var/*", "var/a/b", False),
        ("var/*", "x/var/a", True),
        ("var/**", "var/a/b", True),
        ("var/**", "var", False),
        ("/a/**/z", "a/z", True),
        ("/a/**/z", "a/b/c/z", True),
        ("/a/**/z", "a/bz", False),
        ("/**/z", "z", True),
        ("**", "a/b", True),
        ("/a**z", "a/z", False),
        ("/a**z", "abz", True),
        ("a?c", "abc", True),
        ("a?c", "a/c", False),
        ("[a-c]x", "bx", True),
        ("[!a-c]x", "bx", False),
        ("[^a-c]x", "dx", True),
        ("/a[^x]c", "a/c", False),
        ("[]]", "]", True),
        (r"[\]]", "]", True),
        (r"[a\-z]", "b", False),
        (r"[a\-z]", "-", True),
        ("[[:digit:]]", "7", True),
        ("[[:punct:]]", "[", True),
        ("[[:upper:]_]x", "_x", True),
        ("[^[:alpha:]]", "a", False),
        (r"\*", "*", True),
        (r"\*", "a", False),
        (r"a\\b", r"a\b", True),
        ("a.c", "abc", False),
        ("a[b.]c", "a.c", True),
        ("/", "a", False),
    ],
)
def test_which_paths_a_pattern_matches(pattern: str, path: str, matches: bool) -> None:
    assert Pattern.parse(pattern.encode()).matches(path.encode(), is_directory=False) is matches


def test_names_that_are_not_utf8_match() -> None:
    assert Pattern.parse(b"a\xff*").matches(b"x/a\xffz\n", is_directory=False)
    assert Pattern.parse(b"[\xfe\xff]").matches(b"\xff", is_directory=False)


def test_a_slash_at_the_end_means_directories() -> None:
    pattern = Pattern.parse(b"cache/")
    assert pattern.matches(b"var/cache", is_directory=True)
    assert not pattern.matches(b"var/cache", is_directory=False)


@pytest.mark.parametrize("text", ["", "!", "a[b", "a\\", "[[:none:]]", "[z-a]", "[]"])
def test_a_pattern_that_is_wrong_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="pattern '"):
        Pattern.parse(text.encode())


def file(name: str) -> Node:
    return Node(name.encode(), stat.S_IFREG | 0o644, data=b"x")


def directory(name: str, *children: Node) -> Node:
    return Node(name.encode(), children=list(children))


ROOT = directory(
    "",
    file(".pxar"),
    directory("empty"),
    directory("etc", file("fstab"), directory("ssh", file("key"), file("key.pub")), directory("x11")),
    directory("var", directory("log", file("a.log"), file("b"), directory("old", file("c.log")))),
)


def chosen(included: list[str], excluded: list[str]) -> list[str]:
    archive = Archive(Memory(write(ROOT, split=False).main))
    selection = Selection.parse(map(str.encode, included), map(str.encode, excluded))
    return [path.decode() for path, _entry in selection.walk(archive, archive.root)]


@pytest.mark.parametrize(
    ("included", "excluded", "paths"),
    [
        (["*.log"], [], "var var/log var/log/a.log var/log/old var/log/old/c.log"),
        (["/etc/ssh"], [], "etc etc/ssh etc/ssh/key etc/ssh/key.pub"),
        (["ssh", "!*.pub"], [], "etc etc/ssh etc/ssh/key"),
        (["!*.pub", "ssh", "key.pub"], [], "etc etc/ssh etc/ssh/key etc/ssh/key.pub"),
        (["etc"], ["ssh"], "etc etc/fstab etc/x11"),
        (["key"], ["etc/ssh/"], ""),
        (["old", "b"], ["c.log"], "var var/log var/log/b var/log/old"),
        (["empty/"], [], "empty"),
        (["none"], [], ""),
        ([], ["*.log", "!a.log", "etc", ".pxar", "empty"], "var var/log var/log/a.log var/log/b var/log/old"),
        ([], ["etc", "!key", "var", ".pxar"], "empty"),
    ],
)
def test_what_patterns_choose(included: list[str], excluded: list[str], paths: str) -> None:
    assert sorted(chosen(included, excluded)) == sorted(paths.split())
    order = chosen(included, excluded)
    assert all("/" not in path or path.rpartition("/")[0] in order[:at] for at, path in enumerate(order))


def test_excluded_directories_are_not_read() -> None:
    listed: list[bytes] = []

    class Watched(Archive):
        def children(self, directory: Entry, *, names_only: bool = False) -> Found:
            listed.append(directory.name)
            return super().children(directory, names_only=names_only)

    archive = Watched(Memory(write(ROOT, split=False).main))
    assert list(Selection.parse([], [b"etc", b"log"]).walk(archive, archive.root))
    assert sorted(listed) == [b"", b"empty", b"var"]
