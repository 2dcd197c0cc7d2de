"""The commands in documents, and a datastore and home directory in which they work as they are printed.

A document's blocks of `sh` are commands. A block of `console` is a session: commands after `$ `, and what
they print, in which `…` stands for anything. A block of `toml` whose first line is a comment with a path
below `~/` is that file. An HTML comment before a block says what a reader need not know:

- `<!-- status 6 -->`: its last command ends with this status
- `<!-- in the background -->`: a server; the commands go on when it has printed something
- `<!-- not run: why -->`
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15

from pbsfs.formats.index import FixedIndex
from pbsfs.formats.manifest import CryptMode
from pbsfs.testing.archives import Node, write
from pbsfs.testing.writer import DatastoreWriter
from tests.support import made
from tests.support.disks import ext4_of, partitioned
from tests.support.keyfiles import key_file
from tests.support.masterkeys import add_with_master_key, pem
from tests.support.program import PBSFS

LIMIT = 120.0
"""Seconds that the commands of a document may take."""

DAYS = ["2023-11-14T22:13:20Z", "2023-11-15T22:13:20Z", "2023-11-16T22:13:20Z"]
UUID = "1c4b7a52-0a1e-4a39-8d2a-1c8c1f1c7a01"
"""Of the file system that `ext4_of` makes."""


# --- the commands


@dataclass(frozen=True, slots=True)
class Block:
    """A block of a document. `language`: as it is written. `note`: the comment before it, or ''."""

    line: int
    language: str
    note: str
    text: str

    @property
    def is_run(self) -> bool:
        return self.language in ("sh", "console") and not self.note.startswith("not run: ")

    @property
    def status(self) -> int:
        found = re.fullmatch(r"status (\d+)", self.note)
        return int(found[1]) if found else 0


@dataclass(frozen=True, slots=True)
class Command:
    """What is typed at a prompt, and what it has to print, or None where that is not said."""

    line: int
    text: str
    shown: str | None
    status: int = 0
    in_background: bool = False


def blocks(document: str) -> Iterator[Block]:
    """All blocks of code."""
    pattern = r"(?:^ *<!-- (?P<note>[^\n]*) -->\n)?^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^ *```$"
    for found in re.finditer(pattern, document, re.DOTALL | re.MULTILINE):
        text = re.sub(rf"^{found['indent']}", "", found["text"], flags=re.MULTILINE)
        line = document.count("\n", 0, found.start("text")) + 1
        yield Block(line, found["language"], found["note"] or "", text)


def commands(document: str) -> Iterator[Command]:
    """What a reader of the document types, in its order."""
    for block in blocks(document):
        if not block.is_run:
            continue
        if block.language == "sh":
            yield Command(block.line, block.text, None, block.status, block.note == "in the background")
            continue
        sessions = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
        assert not sessions[0], f"line {block.line}: a session begins with '$ '"
        for number, session in enumerate(sessions[1:], 1):
            typed, shown = re.fullmatch(r"(.*?(?<!\\)\n)(.*)", session, re.DOTALL).groups()  # type: ignore[union-attr]
            status = block.status if number == len(sessions) - 1 else 0
            yield Command(block.line, typed, shown, status)


def matches(shown: str, printed: str) -> bool:
    """Whether a document shows what was printed: trailing spaces do not count, `…` is anything in a line, and
    a line of `…` any lines."""
    pattern = "".join(
        r"(?:.*\n)*?" if line.strip() == "…" else re.escape(line.rstrip()).replace("…", ".*") + r" *\n"
        for line in shown.splitlines()
    )
    return re.fullmatch(pattern, printed) is not None


def script(typed: list[Command], out: Path) -> str:
    """A script for bash that types all of it, and ends at a command with another status than it has to have.

    What the command number N prints goes to the file N in `out`. The last of these is that of the failure."""
    lines = ["set -e -o pipefail", "servers=", "trap '[ -z \"$servers\" ] || kill $servers' EXIT"]
    for number, command in enumerate(typed):
        file = shlex.quote(str(out / f"{number:03}"))
        if command.in_background:
            lines += [f"{command.text.strip()} >{file} 2>&1 &", 'servers="$servers $!"']
            lines.append(f"until [ -s {file} ]; do sleep 0.05; done")
        else:
            lines += [f"exec >{file} 2>&1", "set +e" if command.status else "", command.text.rstrip()]
            lines += [f"[ $? = {command.status} ] || exit 1" if command.status else "", "set -e"]
    return "\n".join([*lines, ""])


def follow(document: str, home: Path, environment: Mapping[str, str], replaced: Mapping[str, str]) -> None:
    """Types all commands of a document in the directory `home`. Asserts their status and what they print.

    `replaced`: what is typed instead of what the document has, and the other way round in what is printed.
    """

    def typed(text: str) -> str:
        return re.sub("|".join(map(re.escape, replaced)) or "$^", lambda old: replaced[old[0]], text)

    for block in blocks(document):
        if block.language == "toml" and (named := re.match(r"# ~/(\S+)\n", block.text)):
            (path := home / named[1]).parent.mkdir(parents=True, exist_ok=True)
            path.write_text(typed(block.text))
    todo = [replace(command, text=typed(command.text)) for command in commands(document)]
    (out := home.parent / "out").mkdir()
    with subprocess.Popen(
        ["bash", "-c", script(todo, out)],
        cwd=home,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    ) as shell:
        try:
            status = shell.wait(LIMIT)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGTERM)
    files = sorted(out.iterdir())
    if status:
        failed = todo[int(files[-1].name)]
        raise AssertionError(f"line {failed.line}, {failed.text!r}: {files[-1].read_text()}")
    assert len(files) == len(todo)
    for command, file in zip(todo, files, strict=True):
        if command.shown is not None:
            printed = file.read_text()
            for old, new in replaced.items():
                printed = printed.replace(new, old)
            assert matches(command.shown, printed), (
                f"line {command.line}, {command.text!r} prints:\n{printed}"
            )


# --- the datastore and the home


def nginx(port: int) -> str:
    return f"server {{\n    listen {port};\n}}\n"


PORTS = (80, 80, 8080)
"""Where the web server of the machine and the container listens, each night."""

INFECTED = b"what the scanner of the tests takes for a virus\n"
CLAMSCAN = f"""\
#!/bin/sh
# Searches as clamscan does, for the one signature that the tests have.
while [ "${{1#-}}" != "$1" ]; do shift; done
grep -rlsF '{INFECTED.decode().strip()}' "$@" | sed 's/$/: Tested-Signature FOUND/' | grep .
[ $? = 1 ] || exit 1
"""


def machine(place: Path, night: int) -> bytes:
    """The disk of the virtual machine 100: a file system, and an encrypted partition."""
    files = {
        "etc/fstab": f"UUID={UUID} / ext4 errors=remount-ro 0 1\n",
        "etc/hostname": "mail\n",
        "etc/nginx/nginx.conf": nginx(PORTS[night]),
        "srv/data/report.txt": "".join(f"All is well, {number}.\n" for number in range(200_000)),
        **({"srv/data/new.txt": "new\n"} if night else {}),
    }
    for name, text in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    for path in [*place.rglob("*"), place]:
        at = made.TIME + (night * made.DAY if path.name == "nginx.conf" else 0)
        os.utime(path, (at, at))
    return partitioned(ext4_of(place, place.with_suffix(".img")))


def root_of(kind: str, night: int) -> Node:
    """The files of the container 200, and of the host web1, which has no virus."""
    first, today = made.TIME * 10**9, (made.TIME + night * made.DAY) * 10**9

    def file(name: str, data: bytes, mtime_ns: int = first) -> Node:
        return Node(name.encode(), stat.S_IFREG | 0o644, os.getuid(), os.getgid(), mtime_ns, data)

    def folder(name: str, *children: Node) -> Node:
        return Node(name.encode(), uid=os.getuid(), gid=os.getgid(), mtime_ns=first, children=[*children])

    infected = [file("invoice.pdf", INFECTED, today)] if (kind, night) == ("ct", 2) else []
    conf = file("nginx.conf", nginx(PORTS[night]).encode(), today if night == 2 else first)
    return folder(
        "",
        folder("etc", file("fstab", b""), file("hostname", b"shop\n"), folder("nginx", conf)),
        folder("home", folder("anna", file("letter.txt", b"Dear Jo\n"))),
        folder("srv", folder("www", file("index.html", b"<html>\n"), folder("upload", *infected))),
    )


def furnish(place: Path) -> list[bytes]:
    """Makes the datastore `store1`, a damaged copy of it, and what the guides take for granted at home.

    Returns the disk of the virtual machine 100, each night.
    """
    (place / "mnt").mkdir(parents=True)
    writer = DatastoreWriter(place / "mnt" / "store1")
    disks = []
    for night in range(len(DAYS)):
        time = made.TIME + night * made.DAY
        disks.append(machine(place / f"machine-{night}", night))
        configuration = b"name: mail\nmemory: 512\nscsi0: local-lvm:vm-100-disk-0,size=18M\n"
        writer.add_snapshot(
            made.snapshot(time=time),
            {"drive-scsi0.img.fidx": disks[-1], "qemu-server.conf.blob": configuration},
            chunk_size=1 << 20,
            client_log=b"INFO: backup finished\n",
        )
        for group, kind in (("200", "ct"), ("web1", "host")):
            archive = write(root_of(kind, night), split=True)
            writer.add_snapshot(
                made.snapshot(group, type=kind, time=time),
                {"root.mpxar.didx": archive.main, "root.ppxar.didx": archive.payload or b""},
            )
    writer.add_snapshot(
        made.snapshot("101"),
        {"drive-scsi0.img.fidx": disks[0]},
        crypt_mode=CryptMode.ENCRYPT,
        key=made.KEY,
        chunk_size=1 << 20,
    )
    private = rsa.generate_private_key(65537, 2048)
    add_with_master_key(writer, private.public_key().encrypt(key_file(hint=None), PKCS1v15()))
    shutil.copytree(writer.path, place / "mnt" / "damaged")
    hurt(DatastoreWriter(place / "mnt" / "damaged"), disks[-1].index(b"All is well, 100000."))
    (home := place / "home").mkdir()
    (home / ".config" / "pbsfs").mkdir(parents=True)
    (home / "key.json").write_bytes(key_file())
    (home / "other-keys").mkdir()
    (home / "other-keys" / "other.json").write_bytes(key_file(key=bytes(range(1, 33))))
    (home / "master-private.pem").write_bytes(pem(private))
    (home / "other-copy.img").write_bytes(disks[-1])
    (place / "today.raw").write_bytes(disks[0])
    (place / "bin").mkdir()
    (place / "bin" / "clamscan").write_text(CLAMSCAN)
    (place / "bin" / "clamscan").chmod(0o755)
    (place / "bin" / "pbsfs").symlink_to(PBSFS)
    return disks


def hurt(writer: DatastoreWriter, offset: int) -> None:
    """Removes the chunk of the last disk of the machine 100 that has this offset."""
    last = writer.snapshot_path(made.snapshot(time=made.TIME + 2 * made.DAY))
    index = FixedIndex((last / "drive-scsi0.img.fidx").read_bytes())
    writer.chunk_path(index.digest(index.find(offset))).unlink()
