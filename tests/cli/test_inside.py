"""Paths inside a mount: commands find the source by them, and trust only mounts that may be trusted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pbsfs.access.description import Access, Description, DirectoryAccess, ServerAccess
from pbsfs.access.keyring import KeyRing
from pbsfs.access.options import SOURCE_ATTRIBUTE, SourceOptions, named_by, shown_source
from pbsfs.base.errors import SourceError
from pbsfs.base.names import Namespace
from pbsfs.base.secret import Secret
from pbsfs.sources.http.tls import Trust
from pbsfs.sources.server.repository import Repository
from tests.support.made import KEY
from tests.support.mounts import Mounted, mounted
from tests.support.needs import need_root
from tests.support.program import PBSFS, environment, error_of, output_of, pbsfs
from tests.support.serving import PASSWORD, USER, access, serving, without
from tests.support.stocked import FIRST, IMAGE, IN_NAMESPACE, SECOND, Stocked, stock
from tests.support.waiting import wait_until

pytestmark = pytest.mark.mount


@pytest.fixture
def mount(stocked: Stocked, tmp_path: Path) -> Iterator[Mounted]:
    with mounted(stocked.path, tmp_path / "m") as found:
        yield found


@contextmanager
def bound(source: Path, place: Path) -> Iterator[Path]:
    """A bind mount of `source` at `place`."""
    need_root("bind mounts")
    place.mkdir()
    subprocess.run(["mount", "--bind", source, place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def test_every_command_takes_a_path_inside_a_mount(mount: Mounted, stocked: Stocked, tmp_path: Path) -> None:
    assert output_of(PBSFS, "ls", mount / "vm/100").split() == [
        *(FIRST.rpartition("/")[2], SECOND.rpartition("/")[2], "latest"),
    ]
    assert f"path:            {SECOND}\n" in output_of(PBSFS, "info", mount / "vm/100/latest")
    output_of(PBSFS, "export", mount / IMAGE, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == stocked.contents[IMAGE]
    assert " 0 damaged" in output_of(PBSFS, "verify", mount / FIRST, mount / "ct")
    size = output_of(PBSFS, "nbd", mount / IMAGE, "--run", 'nbdinfo --size "$uri"')
    assert int(size) == len(stocked.contents[IMAGE])


def test_a_path_may_be_relative_a_link_or_in_a_bind_mount(mount: Mounted, tmp_path: Path) -> None:
    lines = output_of(PBSFS, "info", mount / FIRST)
    assert f"path:            {FIRST}\n" in lines
    (tmp_path / "link").symlink_to(mount / "vm")
    inside = {mount / "vm": f"100/../{FIRST[3:]}", mount / FIRST: ".", tmp_path: f"link/{FIRST[3:]}"}
    for directory, path in inside.items():
        assert output_of(PBSFS, "info", path, cwd=directory) == lines
    assert output_of(PBSFS, "ls", cwd=mount / "vm").split() == ["100", "101"]
    with bound(mount / "vm/100", tmp_path / "bound") as place:
        assert output_of(PBSFS, "info", place / FIRST.rpartition("/")[2]) == lines
        assert output_of(PBSFS, "info", FIRST.rpartition("/")[2], cwd=place) == lines


def test_the_namespace_is_that_of_the_mount(stocked: Stocked, tmp_path: Path) -> None:
    with mounted(stocked.path, tmp_path / "m", "--ns", "prod") as mount:
        path = IN_NAMESPACE.removeprefix("ns/prod/")
        told = environment(PBS_NAMESPACE="other")
        assert "namespace:       prod\n" in output_of(PBSFS, "info", mount / path, env=told)
        text = error_of(pbsfs("info", "--ns", "prod", mount / path), 2)
        assert text == "--ns prod: the mount has a namespace already; leave out --ns"


def test_what_names_a_source_itself_goes_before(mount: Mounted, stocked: Stocked, tmp_path: Path) -> None:
    other = stock(tmp_path / "other")
    other.writer.path.joinpath("vm/100").rename(other.writer.path / "vm/555")
    told = environment(PBSFS_DATASTORE_DIR=str(other.path))
    assert output_of(PBSFS, "ls", "vm", cwd=mount.place, env=told).split() == ["101", "555"]
    assert output_of(PBSFS, "ls", "./vm", cwd=mount.place, env=told).split() == ["100", "101"]
    assert output_of(PBSFS, "ls", mount / "vm", env=told).split() == ["100", "101"]
    options = ("--datastore-dir", other.path)
    assert output_of(PBSFS, "ls", *options, "vm", cwd=mount.place).split() == ["101", "555"]
    error_of(pbsfs("ls", *options, mount / "vm"), 3)


def test_a_relative_path_that_the_environment_takes_elsewhere_is_written_with_a_dot(
    mount: Mounted, stocked: Stocked, tmp_path: Path
) -> None:
    told = environment(PBSFS_DATASTORE_DIR=str(stocked.path))
    for command in (["info"], ["ls"], ["verify"]):
        text = error_of(pbsfs(*command, "m/vm/100", cwd=tmp_path, env=told), 3)
        assert text.startswith("/: there is no 'm'; ")
        assert text.endswith("; for the path in the mount, write ./m/vm/100")
    assert output_of(PBSFS, "info", "./m/vm/100", cwd=tmp_path, env=told)
    assert "write ./" not in error_of(pbsfs("info", "m/none", cwd=tmp_path, env=told), 3)


def test_paths_in_several_places_are_too_many(mount: Mounted, stocked: Stocked, tmp_path: Path) -> None:
    with mounted(stocked.path, tmp_path / "n", "--ns", "prod") as other:
        for second in (other / "vm", tmp_path):
            text = error_of(pbsfs("verify", mount / "vm", second), 2)
            assert text.startswith(f"{mount / 'vm'}, {second}: not all of them are in one mount; name the ")


def test_a_server_is_found_and_no_secret_is_told(stocked: Stocked, tmp_path: Path) -> None:
    with serving(stocked.path) as server, mounted(access(server), tmp_path / "m") as mount:
        told = without(access(server), "PBS_REPOSITORY", "PBS_FINGERPRINT")
        assert output_of(PBSFS, "ls", mount / "vm", env=told).split() == ["100", "101"]
        error_of(pbsfs("ls", mount / "vm", env=without(told, "PBS_PASSWORD")), 2)
        shown = os.getxattr(mount.place, SOURCE_ATTRIBUTE)
        assert SOURCE_ATTRIBUTE in os.listxattr(mount.place)
        assert PASSWORD.encode() not in shown
        found, _subtree = named_by(shown)
        assert found.repository == server.repository(USER)
        assert found.fingerprint == server.fingerprint.replace(":", "").lower()


def test_the_password_of_another_server_is_not_for_that_of_the_mount(
    stocked: Stocked, tmp_path: Path
) -> None:
    with serving(stocked.path) as server, mounted(access(server), tmp_path / "m") as mount:
        own = without(access(server), "PBS_FINGERPRINT")
        others = [{"PBS_REPOSITORY": f"{USER}@192.0.2.7:store"}, {"PBS_SERVER": "192.0.2.7"}]
        for other in others:
            told = without(own, "PBS_REPOSITORY") | other
            assert "no password for" in error_of(pbsfs("ls", mount / "vm", env=told), 2)
        for same in (own, own | {"PBS_REPOSITORY": own["PBS_REPOSITORY"] + "2"}):
            assert output_of(PBSFS, "ls", mount / "vm", env=same).split() == ["100", "101"]


def test_a_mount_whose_process_died_says_so(mount: Mounted, tmp_path: Path) -> None:
    place = tmp_path / "another"
    mount.signal(signal.SIGKILL)
    wait_until(mount.is_dead, "it is dead")
    text = error_of(pbsfs("info", mount / "vm/100"), 4)
    assert text.endswith(
        f"the process of the mount at {mount.place} has died; clear it with: pbsfs umount {mount.place}"
    )
    place.mkdir()
    dead = {"PBSFS_DATASTORE_DIR": str(mount.place)}
    for told, options in ((dead, ()), ({}, ("--datastore-dir", mount.place / "vm"))):
        text = error_of(pbsfs("mount", *options, place, env=environment(**told)), 4)
        assert "Transport endpoint is not connected" in text
    output_of(PBSFS, "umount", mount.place)


def test_the_mount_of_another_user_is_not_believed(tmp_path: Path) -> None:
    # The kernel says whose a mount is; here its table is made up.
    table = tmp_path / "mountinfo"
    (tmp_path / "x").mkdir()
    table.write_text(f"1 1 0:9 / {tmp_path}/x rw - fuse.pbsfs x rw,user_id=4711,group_id=1\n")
    code = f"""
import pathlib, sys
from pbsfs.fuse import mountpoint
mountpoint.MOUNTINFO = pathlib.Path({str(table)!r})
sys.argv = ["pbsfs", "ls", {str(tmp_path / "x")!r}]
from pbsfs.cli import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert "belongs to another user; name the source with --repository" in error_of(done, 4)


ODD = Path(os.fsdecode("/ü/\xff ☃".encode() + b"\xff"))
SERVER = ServerAccess(Repository.parse("u@pbs!t@h:1:s"), Secret("geheim"), Trust(pinned="ab"))


@pytest.mark.parametrize(
    ("access", "namespace", "options"),
    [
        (SERVER, "prod/db", SourceOptions(repository="u@pbs!t@h:1:s", fingerprint="ab", namespace="prod/db")),
        (DirectoryAccess(ODD), "", SourceOptions(datastore_dir=ODD, namespace="")),
    ],
)
def test_what_a_mount_tells_is_read_as_it_was(access: Access, namespace: str, options: SourceOptions) -> None:
    shown = shown_source(Description(access, Namespace.parse(namespace), KeyRing([KEY])), "vm/\udcff")
    assert named_by(shown) == (options, "vm/\udcff")
    assert b"geheim" not in shown


@pytest.mark.parametrize("text", [b"", b"x", b"[]", b"null", b'"x"', b'{"datastore_dir": 1}', b"\xff"])
def test_what_is_not_told_by_a_mount_of_ours_is_refused(text: bytes) -> None:
    with pytest.raises(SourceError, match="does not name its source"):
        named_by(text)
