"""`pbsfs export --format qcow2`: qemu-img writes the file, and reads the image through nbdkit.

So there is no raw copy in between, and holes stay holes. Synchronous; called by `pbsfs export`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from pbsfs.access.description import Description
from pbsfs.base.errors import HelperError, OutputError, UsageError
from pbsfs.base.text import printable
from pbsfs.cli.progress import is_shown
from pbsfs.cli.running import run_on_described
from pbsfs.nbd import launch
from pbsfs.nbd.serving import serving
from pbsfs.runtime.process import signals_held_back
from pbsfs.tasks.image.file_target import FileTarget
from pbsfs.tasks.image.opening import open_target
from pbsfs.tree import ImageFile, Tree


def export_qcow2(
    description: Description,
    path: str,
    dest: Path,
    *,
    force: bool,
    mode: int | None,
    progress: bool | None,
    log_format: str | None,
) -> None:
    """Writes the image at `path` in the tree of a source to the qcow2 file `dest`, or into that directory.

    `mode`, `progress`: as for other exports. `log_format`: of nbdkit's log.

    Raises UsageError, OutputError, HelperError, and what opening the image raises.
    """

    async def find(tree: Tree) -> tuple[str, str]:
        node = await tree.find(path)
        if not isinstance(node, ImageFile):
            raise UsageError(f"{node}: --format qcow2 is for one image; name one")
        await node.open()
        return os.fsdecode(node.path), os.fsdecode(node.name)

    if str(dest) == "-" or (os.path.exists(dest) and not (os.path.isfile(dest) or os.path.isdir(dest))):
        raise UsageError(f"{dest}: --format qcow2 requires a file; name one")
    if shutil.which("qemu-img") is None:
        raise HelperError("qemu-img is not installed; apt install qemu-utils")
    nbdkit = launch.find_nbdkit()
    served, name = run_on_described(find, description, first=path)
    with ExitStack() as stack:
        # qemu-img writes to the part by its name, and sets its size.
        qcow2 = f"{name.removesuffix('.img')}.qcow2"
        target = stack.enter_context(open_target(dest, qcow2, 0, force=force, mode=mode))
        assert isinstance(target, FileTarget)
        address = stack.enter_context(launch.private_socket())
        stack.enter_context(
            serving(nbdkit, served, address, ["--exit-with-parent"], description, log_format=log_format)
        )
        shown = ["-p"] if is_shown(progress) else []
        # `file:`, as a name with a colon would be a protocol.
        output = f"file:{target.part.absolute()}"
        # In a group of its own: Ctrl-C ends pbsfs, which ends qemu-img.
        with signals_held_back():
            process = subprocess.Popen(
                ["qemu-img", "convert", *shown, "-f", "raw", "-O", "qcow2", address.uri(), output],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr if shown else subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                process_group=0,
            )
            stack.callback(launch.stop, process)
        _output, errors = process.communicate()
        if process.returncode < 0:
            raise launch.ending("qemu-img", process.returncode)
        if process.returncode != 0:
            lines = printable(errors.decode(errors="replace"), keep="\n").splitlines() or ["qemu-img failed"]
            said = f"cannot write {target}: {lines[-1]}"
            if "No space left" in said:
                raise OutputError(f"{said}; free some space, or name another place")
            raise HelperError(f"{said}; correct what the messages above name")
