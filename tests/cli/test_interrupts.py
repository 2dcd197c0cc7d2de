"""Ctrl-C at many points of each command: it ends with status 130, and nothing is left."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pbsfs.fuse.mountpoint import mounted_at
from tests.support.foreground import foreground
from tests.support.mounts import is_running
from tests.support.needs import need, need_fuse
from tests.support.program import run
from tests.support.server import ReferenceServer
from tests.support.server.faults import Hold
from tests.support.serving import access, serving
from tests.support.stocked import CHUNK, CONFIGURATION, FIRST, IMAGE, NEWER_IMAGE, Stocked
from tests.support.waiting import wait_until

POINTS = (0, 1, 2, 4, 7)
"""The requests that are held, of those that a command sends."""


@pytest.fixture
def server(stocked: Stocked) -> Iterator[ReferenceServer]:
    with serving(stocked.path) as found:
        yield found


COMMANDS = {
    "ls": (["ls", "-lR", "vm"], 3),
    "ls in a disk": (["ls", f"files/{FIRST}"], 5),
    "info": (["info", IMAGE], 4),
    "cat": (["cat", CONFIGURATION], 4),
    "find": (["find", "vm", "--name", "*"], 3),
    "diff": (["diff", IMAGE, NEWER_IMAGE], 5),
    "map": (["map", IMAGE], 4),
    "verify": (["verify", "vm/100"], 5),
    "versions": (["versions", f"{IMAGE}"], 3),
    "export": (["export", IMAGE, "DEST/disk"], 5),
    "export to standard output": (["export", IMAGE, "-"], 5),
    "export of a snapshot": (["export", "vm/100/latest", "DEST/all/"], 5),
    "export in place": (["export", "--in-place", IMAGE, "DEST/existing"], 4),
    "export to qcow2": (["export", "--format", "qcow2", IMAGE, "DEST/disk.qcow2"], 5),
    "mount": (["mount", "DEST/mount"], 2),
    "mount in the foreground": (["mount", "-f", "DEST/mount"], 2),
    "nbd": (["nbd", IMAGE], 4),
}
"""Each command, and how many of the points it gets to."""


def descendants(pid: int) -> Iterator[int]:
    """The processes that a process started, whatever their groups, and those that these started."""
    for found in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, found.read_text().split()):
            yield child
            yield from descendants(child)


PROGRAMS = {"export to qcow2": ["nbdkit", "qemu-img"], "nbd": ["nbdkit"]}


@pytest.mark.parametrize(
    ("name", "point"), [(name, point) for name, (_, most) in COMMANDS.items() for point in POINTS[:most]]
)
def test_ctrl_c_ends_a_command_and_nothing_is_left(
    server: ReferenceServer, tmp_path: Path, name: str, point: int
) -> None:
    for program in PROGRAMS.get(name, []):
        need(program)
    if name.startswith("mount"):
        need_fuse()
    (existing := tmp_path / "existing").write_bytes(bytes(CHUNK))
    (tmp_path / "mount").mkdir()
    words = [word.replace("DEST", str(tmp_path)) for word in COMMANDS[name][0]]
    held = server.faults.add(Hold(match="/", skip=point))
    with foreground(*words, env=access(server)) as command:
        held.wait()
        started = list(descendants(command.process.pid))
        command.interrupt()
        try:
            assert command.ended() == 130
            wait_until(lambda: not any(map(is_running, started)), "what it started ends too")
        finally:
            held.release()
        errors = command.errors()
    assert len(errors) <= 1, errors
    assert "Traceback" not in "".join(errors)
    assert mounted_at(tmp_path / "mount") is None
    left = [path.name for path in tmp_path.iterdir() if path.name not in ("existing", "mount", "all")]
    assert (left, list((tmp_path / "all").glob("*"))) == ([], [])
    assert existing.read_bytes() == bytes(CHUNK)


_AT_IMPORT = """
import os, runpy, signal, sys
MODULE = sys.argv.pop(1)
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == MODULE:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
runpy.run_module("pbsfs", run_name="__main__")
"""


@pytest.mark.parametrize("module", ["pbsfs.cli", "click", "pbsfs.cli.ls", "trio", "pbsfs.tree", "h2"])
def test_ctrl_c_while_it_imports_its_modules_ends_it_without_a_traceback(
    server: ReferenceServer, module: str
) -> None:
    done = run([sys.executable, "-c", _AT_IMPORT, module, "ls", "vm"], env=access(server))
    assert done.returncode in (130, -signal.SIGINT)  # which shells show as 130
    assert (done.stdout, done.stderr.strip()) == ("", "")
