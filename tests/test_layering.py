"""Imports point one way, from the command line down to the formats; and the formats do no I/O."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import pbsfs

PACKAGE = Path(pbsfs.__file__).parent

LAYERS = (
    ("",),  # the package itself: its version
    ("base",),
    ("runtime", "formats"),
    ("sources", "contents"),
    ("chunks", "disks"),
    ("reader",),
    ("access", "tree", "testing"),
    ("tasks",),
    ("fuse", "nbd", "boot"),
    ("cli",),
    ("__main__",),
)
"""The packages of each layer, lowest first. A package imports from itself and from layers below its own."""

LAYER = {package: number for number, packages in enumerate(LAYERS) for package in packages}

IO = {
    *("asyncio", "concurrent", "fcntl", "glob", "http", "io", "logging", "mmap", "multiprocessing", "os"),
    *("pathlib", "select", "selectors", "shutil", "signal", "socket", "ssl", "subprocess", "sys", "tempfile"),
    *("time", "trio", "urllib", "click", "rich", "pwd", "pyfuse3"),
}
"""Modules that touch the world; no part of `pbsfs.formats` has any business with them."""


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Every module of the package: its name, and its source as a tree."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), ast.parse(path.read_text())


def imports(module: str, tree: ast.Module, *, package: bool = False) -> Iterator[str]:
    """The full names of all that a module imports, wherever in it: `from a.b import c` is `a.b.c`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: None if package and node.level == 1 else -(node.level - package)]
                base = ".".join([*above, *filter(None, [base])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def package_of(name: str) -> str:
    """The package of a module, or of something that was imported from one."""
    first = name.split(".")[1:2]
    return first[0] if first and not first[0].startswith("__version") else ""


def wrong_imports(module: str, tree: ast.Module, *, package: bool = False) -> list[str]:
    """Those imports of a module that point up or sideways, and those of no known package."""
    own = LAYER.get(package_of(module), 0)
    return [
        name
        for name in imports(module, tree, package=package)
        if name.split(".")[0] == "pbsfs"
        and package_of(name) != package_of(module)
        and LAYER.get(package_of(name), len(LAYERS)) >= own
    ]


def is_command(tree: ast.Module) -> bool:
    """Whether a module defines a command of the command line."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    decorators = [ast.unparse(decorator) for node in functions for decorator in node.decorator_list]
    return any(decorator.startswith(("click.command(", "click.group(")) for decorator in decorators)


def imported_commands(module: str, tree: ast.Module, commands: set[str]) -> list[str]:
    """Those of `commands` that a module imports, or imports from."""
    others = commands - {module}
    return [name for name in imports(module, tree) if others & {name, name.rpartition(".")[0]}]


def doings(tree: ast.Module) -> list[str]:
    """What in a module of the formats is I/O: imports, `open` and similar functions, anything async."""
    found = [name for name in imports("pbsfs.formats.x", tree) if name.split(".")[0] in IO]
    for node in ast.walk(tree):
        if isinstance(node, ast.AsyncFunctionDef | ast.Await):
            found.append(f"async in line {node.lineno}")
        elif isinstance(node, ast.Name) and node.id in ("open", "print", "input", "__import__"):
            found.append(f"{node.id} in line {node.lineno}")
    return found


def is_package(module: str) -> bool:
    return (PACKAGE.parent / Path(*module.split("."))).is_dir()


def test_every_module_belongs_to_a_package_that_has_its_layer() -> None:
    homeless = [name for name, _tree in modules() if package_of(name) not in LAYER]
    assert not homeless, "give them a place in LAYERS"


@pytest.mark.parametrize(("module", "tree"), [pytest.param(*m, id=m[0]) for m in modules()])
def test_imports_point_down(module: str, tree: ast.Module) -> None:
    assert not wrong_imports(module, tree, package=is_package(module))


@pytest.mark.parametrize(
    ("module", "tree"), [pytest.param(*m, id=m[0]) for m in modules() if package_of(m[0]) == "formats"]
)
def test_the_formats_do_no_io(module: str, tree: ast.Module) -> None:
    assert module.startswith("pbsfs.formats")
    assert not doings(tree)


COMMANDS = {name for name, tree in modules() if name.startswith("pbsfs.cli.") and is_command(tree)}


@pytest.mark.parametrize(
    ("module", "tree"), [pytest.param(*m, id=m[0]) for m in modules() if m[0].startswith("pbsfs.cli.")]
)
def test_no_command_imports_another(module: str, tree: ast.Module) -> None:
    assert {"pbsfs.cli.boot", "pbsfs.cli.nbd", "pbsfs.cli.key"} <= COMMANDS
    assert not imported_commands(module, tree, COMMANDS), "what both need belongs to a module of its own"


def test_no_test_module_imports_another() -> None:
    tests = Path(__file__).parent
    found = [
        f"{path.relative_to(tests)}: {name}"
        for path in tests.rglob("*.py")
        for name in imports("tests.x", ast.parse(path.read_text()))
        if any(step.startswith("test_") for step in name.split(".")[:-1])
    ]
    assert not found, "what several modules need belongs to a module of its own"


# --- the check itself


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pbsfs.formats.blob", "import pbsfs.sources.base"),
        ("pbsfs.formats.blob", "from pbsfs import reader"),
        ("pbsfs.formats.blob", "from pbsfs.tree import Tree"),
        ("pbsfs.formats.blob", "from ..sources import base"),
        ("pbsfs.formats.blob", "from .. import sources"),
        ("pbsfs.base.names", "from ..formats import blob"),
        ("pbsfs.base.names", "from .. import tree"),
        ("pbsfs.base.names", "from pbsfs.formats.blob import decode"),
        ("pbsfs.base.errors", "import pbsfs.formats.blob as n"),
        ("pbsfs.chunks.store", "from pbsfs.reader.image import Image"),
        ("pbsfs.sources.directory.source", "from pbsfs.access.options import resolve"),
        ("pbsfs.sources.directory.source", "def f():\n    from pbsfs.chunks.store import ChunkStore"),
        (
            "pbsfs.sources.directory.source",
            "class C:\n    def f(self):\n        if 1:\n            import pbsfs.cli.ls",
        ),
        ("pbsfs.sources.server.pool", "from ...reader import store"),
        ("pbsfs.sources.base", "from pbsfs.testing.writer import DatastoreWriter"),
        ("pbsfs.reader.image", "if TYPE_CHECKING:\n    from pbsfs.tree import Tree"),
        ("pbsfs.reader.image", "from pbsfs.access.sizes import parse_size"),
        ("pbsfs.fuse.mount", "from pbsfs.cli import main"),
        ("pbsfs.tasks.image.copy", "from pbsfs.fuse.inodes import Inode"),
        ("pbsfs.tree", "import os, pbsfs.fuse"),
        ("pbsfs.cli.ls", "from pbsfs.cellar import wine"),
        ("pbsfs.cli.ls", "import pbsfs.__main__"),
    ],
)
def test_an_import_that_points_up_or_sideways_is_caught(module: str, source: str) -> None:
    assert wrong_imports(module, ast.parse(source))


def test_a_relative_import_in_a_package_is_caught_too() -> None:
    assert wrong_imports("pbsfs.formats", ast.parse("from ..reader import store"), package=True)
    assert not wrong_imports("pbsfs.formats", ast.parse("from .blob import decode"), package=True)
    assert not wrong_imports(
        "pbsfs.formats", ast.parse("from . import blob\nfrom ..base.names import x"), package=True
    )


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pbsfs.formats.blob", "import zlib\nfrom pbsfs.base.errors import DamageError"),
        (
            "pbsfs.formats.blob",
            "from . import keys\nfrom .keys import Key\nfrom ..base.errors import DamageError",
        ),
        ("pbsfs.cli.mount", "from pbsfs.fuse import mount\nfrom pbsfs import __version__"),
        ("pbsfs.tree", "import pbsfs.reader.image"),
    ],
)
def test_an_import_that_points_down_is_none_to_complain_of(module: str, source: str) -> None:
    assert not wrong_imports(module, ast.parse(source))


@pytest.mark.parametrize(
    "source",
    [
        "from pbsfs.cli.nbd import served",
        "from pbsfs.cli import nbd",
        "import pbsfs.cli.nbd",
        "from .nbd import served",
        "def f():\n    from . import nbd",
    ],
)
def test_a_command_that_imports_another_is_caught(source: str) -> None:
    assert imported_commands("pbsfs.cli.boot", ast.parse(source), COMMANDS)
    assert not imported_commands("pbsfs.cli.nbd", ast.parse(source), COMMANDS)


@pytest.mark.parametrize(
    "source",
    [
        "import os",
        "import os.path as p",
        "from pathlib import Path",
        "def f():\n    import trio",
        "import struct, logging",
        "def f():\n    return open('x')",
        "async def f(): pass",
        "print(1)",
    ],
)
def test_io_in_the_formats_is_caught(source: str) -> None:
    assert doings(ast.parse(source))
