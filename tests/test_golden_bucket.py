"""The vendor's own data in a bucket of a real S3 server, read as its copy in a directory is."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import golden
from tests.support.mounts import fails_with, mounted
from tests.support.needs import need, need_fuse
from tests.support.program import PBSFS, environment, output_of, pbsfs
from tests.support.s3 import ACCESS_KEY, BUCKET, SECRET_KEY, STORE
from tests.support.s3.gateway import REGION, Gateway
from tests.support.server import certificate as certificates
from tests.support.sums import sum_of, sum_of_stream

pytestmark = pytest.mark.golden

DIRECTORY = golden.ROOT / "bucket" / "gbucket"
KEY = golden.ROOT / "keys" / "plain.json"
DISK = "vm/500/2025-06-28T04:53:20Z/drive-scsi0.img"
PLUGIN = Path(__file__).parents[1] / "nbd_bridge.py"


@dataclass(frozen=True)
class Kept:
    """The bucket, and how commands get at it."""

    gateway: Gateway
    env: dict[str, str]


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    made = certificates.make(ca_signed=True)
    (ca := tmp_path / "ca.pem").write_text(made.ca or "")
    with Gateway(tmp_path / "s3", made) as gateway:
        gateway.fill(DIRECTORY)
        env = environment(
            HOME=str(tmp_path),
            PBSFS_BUCKET=f"s3://{BUCKET}/{STORE}",
            AWS_ENDPOINT_URL_S3=f"https://localhost:{gateway.port}",
            AWS_REGION=REGION,
            AWS_ACCESS_KEY_ID=ACCESS_KEY,
            AWS_SECRET_ACCESS_KEY=SECRET_KEY,
            AWS_CA_BUNDLE=str(ca),
        )
        yield Kept(gateway, env)


def rows() -> list[tuple[str, str, int]]:
    """Path, SHA-256 and size of each image."""
    lines = (golden.ROOT / "bucket" / "checksums.tsv").read_text().splitlines()
    found = (line.split("\t") for line in lines)
    return [(path, wanted, int(size)) for wanted, size, path, *_rest in found]


def said(words: Sequence[str], env: dict[str, str] | None = None) -> tuple[int, str, str]:
    where = ["--datastore-dir", str(DIRECTORY)] if env is None else []
    command, *rest = words
    done = pbsfs(command, *where, "--keyfile", KEY, *rest, env=environment() if env is None else env)
    return done.returncode, done.stdout, done.stderr


def sum_of_tree(place: Path) -> str:
    """Of all that tar sees there."""
    with subprocess.Popen(["tar", "-C", place, "--sort=name", "-c", "."], stdout=subprocess.PIPE) as tar:
        assert tar.stdout is not None
        found = sum_of_stream(tar.stdout)
    assert tar.returncode == 0
    return found


def test_commands_say_what_they_say_of_the_copy_in_a_directory(kept: Kept) -> None:
    for words in (
        ["ls", "-R"],
        ["ls", "-R", "--json", "files/host/pad/latest"],
        ["find", "--no-progress", "--name", "*.txt", "--json"],
        ["find", "--no-progress", "files/vm/500/latest", "--type", "l"],
        ["cat", "vm/500/latest/qemu-server.conf"],
        ["info", "vm/500/latest"],
        ["verify", "--no-progress"],
    ):
        found = said(words, kept.env)
        assert found == said(words), words
        assert found[0] == 0, words
        assert found[1], words


def test_every_image_is_exported_as_it_was_backed_up(kept: Kept, tmp_path: Path) -> None:
    for path, wanted, size in rows():
        copy = tmp_path / "copy.img"
        output_of(PBSFS, "export", "--no-progress", path, copy, env=kept.env)
        assert (copy.stat().st_size, sum_of(copy)) == (size, wanted)
        copy.unlink()


@pytest.mark.mount
def test_it_is_mounted_with_what_is_in_archives_and_disks(kept: Kept, tmp_path: Path) -> None:
    need_fuse()
    with mounted(kept.env, tmp_path / "m", "--keyfile", str(KEY), files=True) as mount:
        for path, wanted, size in rows():
            assert ((mount / path).stat().st_size, sum_of(mount / path)) == (size, wanted)
        assert os.listdir(mount / "ns/prod/ns/void") == []
        with mounted(DIRECTORY, tmp_path / "d", "--keyfile", str(KEY), files=True) as other:
            assert sum_of_tree(mount / "files/host/pad/latest") == sum_of_tree(
                other / "files/host/pad/latest"
            )
        (mount / ".pbsfs/stats").read_text()


def test_nbd_serves_its_disks(kept: Kept, tmp_path: Path) -> None:
    need("nbdkit", "nbdcopy")
    copy = tmp_path / "copy.img"
    run = f"nbdcopy $uri {copy}"
    command = ["nbdkit", "-U", "-", "python", str(PLUGIN), f"path={DISK}", "--run", run]
    output_of(*command, env=kept.env)
    assert sum_of(copy) == next(wanted for path, wanted, _size in rows() if path == DISK)


@pytest.mark.mount
def test_a_mount_outlives_its_object_store(kept: Kept, tmp_path: Path) -> None:
    """The store ends while programs read, and comes back: the reads wait, and are right."""
    need_fuse()
    with mounted(kept.env, tmp_path / "m") as mount:
        sums: dict[str, str] = {}

        def read(path: str) -> None:
            sums[path] = sum_of(mount / path)

        threads = [threading.Thread(target=read, args=(path,)) for path, _wanted, _size in rows()]
        for thread in threads:
            thread.start()
        kept.gateway.stop()
        kept.gateway.start()
        for thread in threads:
            thread.join()
        assert sums == {path: wanted for path, wanted, _size in rows()}
        assert all("available again" in line or "trying again" in line for line in mount.log_lines())


@pytest.mark.mount
def test_a_backup_that_is_pruned_under_a_mount_is_an_error_and_no_damage(kept: Kept, tmp_path: Path) -> None:
    need_fuse()
    pruned, stays = sorted(path for path, _wanted, _size in rows() if path.startswith("vm/500"))[0::2][:2]
    with mounted(kept.env, tmp_path / "m", "--refresh", "0", "--on-damage", "zero") as mount:
        with (mount / pruned).open("rb", buffering=0) as file:
            assert file.read(4096)
            snapshot = pruned.rpartition("/")[0]
            keys = [f"{STORE}/.cnt/{snapshot}/{name}" for name in ("index.json.blob", "drive-scsi0.img.fidx")]
            kept.gateway.delete(keys)
            chunks = sorted(path.name for path in (DIRECTORY / ".chunks").glob("*/*"))[1:]
            kept.gateway.delete(f"{STORE}/.chunks/{name[:4]}/{name}" for name in chunks)
            assert fails_with(errno.EIO, file.readall)
        assert not (mount / pruned).exists()
        assert (mount / stays).stat().st_size
        assert any("removed while it was read" in line for line in mount.log_lines())


def test_the_real_server_was_not_written_to(kept: Kept) -> None:
    """pbsfs only reads: what is there stays as it was."""

    def stored() -> list[tuple[Path, int]]:
        base = kept.gateway.directory / "data"
        return sorted((path, path.stat().st_size) for path in base.rglob("*") if path.is_file())

    before = stored()
    done = subprocess.run([PBSFS, "ls", "-R"], env=kept.env, capture_output=True, check=True)
    assert done.stdout
    assert stored() == before
