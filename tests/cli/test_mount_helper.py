"""`mount.pbsfs`: called as mount(8) calls it, and by mount(8) itself."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pbsfs.base.errors import UsageError
from pbsfs.cli.mount_helper import status_of, translated
from pbsfs.fuse.mountpoint import mounted_at
from tests.support.mounts import cleaned_up
from tests.support.needs import need, need_fuse, need_root
from tests.support.program import environment, error_of, output_of, pbsfs, run
from tests.support.serving import PASSWORD, USER, access, serving, without
from tests.support.stocked import CONFIGURATION, FIRST, SECOND, Stocked, stock

HELPER = [sys.executable, "-c", "from pbsfs.cli.mount_helper import main; main()"]
PROJECT = Path(__file__).parents[2] / "pyproject.toml"


@pytest.fixture
def stocked(tmp_path: Path) -> Stocked:
    (tmp_path / "m").mkdir()
    return stock(tmp_path / "datastore")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("rw",), []),
        (("ro,nosuid,nodev", "noexec,user,_netdev"), ["ro", "nosuid", "nodev", "noexec", "user", "_netdev"]),
        (("rw,allow_other,uid=1000,x-gvfs-show",), ["allow_other", "uid=1000", "x-gvfs-show"]),
    ],
)
def test_general_options_are_those_of_pbsfs_mount(given: tuple[str, ...], words: list[str]) -> None:
    assert translated("home:vm", given) == ([f"-o{word}" for word in ["fsname=home:vm", *words]], {})


def test_options_of_pbsfs_mount_lose_their_dashes() -> None:
    given = "ns=prod/db,keyfile=/k 1,keyfile=/k2,fingerprint=ab:cd,cache_size=1G,on-damage=zero,nofiles"
    words, files = translated("a,b", (given, "password-file=/p,key_password_file=/q"))

    assert words == [
        *("--ns=prod/db", "--keyfile=/k 1", "--keyfile=/k2", "--fingerprint=ab:cd", "--cache-size=1G"),
        *("--on-damage=zero", "-ofsname=a\\,b", "-onofiles"),
    ]
    assert files == {"PBS_PASSWORD": "/p", "PBS_ENCRYPTION_PASSWORD": "/q"}


def test_options_of_a_bucket_are_among_them() -> None:
    given = "endpoint=https://s3:9000,region=r,path_style,aws-profile=ci,s3-config=/s3.cfg,ca-file=/ca"
    given += ",cache-dir=/c,offline"
    words, files = translated("s3://b/store:vm", (given, "access-key-file=/i,secret_key_file=/s,anonymous"))
    assert words == [
        *("--endpoint=https://s3:9000", "--region=r", "--path-style", "--aws-profile=ci"),
        *("--s3-config=/s3.cfg", "--ca-file=/ca", "--cache-dir=/c", "--offline"),
        *("--anonymous", "-ofsname=s3://b/store:vm"),
    ]
    assert files == {"AWS_ACCESS_KEY_ID": "/i", "AWS_SECRET_ACCESS_KEY": "/s"}


def test_a_line_of_fstab_may_read_from_the_cache_alone() -> None:
    words, _files = translated("home:", ("offline,cache-dir=/var/cache/pbsfs",))
    assert words == ["--offline", "--cache-dir=/var/cache/pbsfs", "-ofsname=home:"]


@pytest.mark.parametrize("option", ["fancy", "cache=1G", "datastore-dir=/x", "foreground", "subtree=x"])
def test_an_unknown_option_is_refused_by_name(option: str) -> None:
    name, _equals, value = option.partition("=")
    shown = f"{name}=…" if value else option
    there = "password-file=, .*, ns=, .*, offline, allow_other, .*, _netdev, .*"
    there += ", noauto, .*, nofail, .*, ro, .*, and all that begin with x-"
    with pytest.raises(UsageError, match=f"'{shown}' is not known; there are {there}"):
        translated("home:", (f"rw,{option}",))


@pytest.mark.parametrize(
    "name", ["password", "secret", "key-password", "key_password", "secret-key", "PassWord", "token_secret"]
)
def test_a_secret_among_the_options_is_refused_and_not_shown(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name}=: other users can read it; .* with .*-file=") as error:
        translated("home:", (f"{name}=geheim",))
    assert "geheim" not in str(error.value)


def test_an_empty_source_is_refused(tmp_path: Path) -> None:
    assert error_of(run([*HELPER, "", tmp_path]), 1).startswith("the source is empty; give a profile")


def test_an_option_needs_its_value() -> None:
    with pytest.raises(UsageError, match="mount option ns: has no value; write ns=VALUE"):
        translated("home:", ("ns",))


def test_the_exit_statuses_are_those_of_mount_8() -> None:
    assert [status_of(code) for code in (None, 0, 2, 130, 3, 4, 7, 1)] == [0, 0, 1, 8, 32, 32, 32, 32]


def test_both_names_of_the_helper_are_programs_of_the_package() -> None:
    scripts = tomllib.loads(PROJECT.read_text())["project"]["scripts"]
    for name in ("mount.pbsfs", "mount.fuse.pbsfs"):
        module, _colon, function = scripts[name].partition(":")
        assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["-o", "rw,fancy"], "mount option 'fancy' is not known"),
        (["-N", "/proc/1/ns/mnt"], "-N: not supported; enter the namespace with nsenter"),
        (["-t", "ext4"], "-t ext4: not a type of pbsfs"),
        (["-x"], "No such option"),
        (["-o", "refresh=soon"], "soon is not a number of seconds"),
    ],
)
def test_wrong_usage_is_status_1(stocked: Stocked, tmp_path: Path, words: list[str], reason: str) -> None:
    assert reason in error_of(run([*HELPER, stocked.path, tmp_path / "m", *words]), 1)
    assert not mounted_at(tmp_path / "m")


def test_a_failure_is_status_32(stocked: Stocked, tmp_path: Path) -> None:
    missing = f"{stocked.path}:vm/4711"
    assert "there is no '4711'" in error_of(run([*HELPER, missing, tmp_path / "m", "-o", "rw"]), 32)


def test_a_fake_mount_checks_the_options(stocked: Stocked, tmp_path: Path) -> None:
    assert output_of(*HELPER, stocked.path, tmp_path / "m", "-f", "-s", "-v", "-n", "-o", "rw") == ""
    assert not mounted_at(tmp_path / "m")


@pytest.mark.mount
def test_the_mount_has_the_name_of_the_line_in_fstab(stocked: Stocked, tmp_path: Path) -> None:
    need_fuse()
    place, source = tmp_path / "m", f"{stocked.path}:vm/100"
    other = environment(PBSFS_DATASTORE_DIR="/nowhere", PBSFS_PROFILE="none")
    with cleaned_up(place):
        words = [source, str(place), "-o", "rw,nosuid,nodev,noexec,users,_netdev", "-t", "fuse.pbsfs"]
        assert output_of(*HELPER, *words, env=other) == ""
        assert output_of("findmnt", "-nro", "SOURCE,FSTYPE", place).split() == [source, "fuse.pbsfs"]
        assert "noexec" in output_of("findmnt", "-nro", "OPTIONS", place)
        assert FIRST.rpartition("/")[2] in os.listdir(place)
        assert pbsfs("umount", place).returncode == 0


@pytest.mark.mount
def test_the_password_is_that_of_the_file(stocked: Stocked, tmp_path: Path) -> None:
    need_fuse()
    (file := tmp_path / "password").write_text(f"{PASSWORD}\n")
    file.chmod(0o600)
    place = tmp_path / "m"
    with serving(stocked.path) as server, cleaned_up(place):
        told = without(access(server), "PBS_REPOSITORY") | {"PBS_PASSWORD": "wrong"}
        words = [f"{server.repository(USER)}/vm/100", str(place), "-o", f"rw,password-file={file}"]
        assert output_of(*HELPER, *words, env=told) == ""
        assert SECOND.rpartition("/")[2] in os.listdir(place)
        assert pbsfs("umount", place).returncode == 0


MOUNT_8 = r"""
set -eu
mount -t tmpfs none "$FOLDER/o"
mkdir "$FOLDER/o/upper" "$FOLDER/o/work"
mount -t overlay none -o "lowerdir=/usr/sbin,upperdir=$FOLDER/o/upper,workdir=$FOLDER/o/work" /usr/sbin
cp "$FOLDER/helper" /usr/sbin/mount.pbsfs
cp "$FOLDER/helper" /usr/sbin/mount.fuse.pbsfs
mount --bind "$FOLDER/fstab" /etc/fstab

mount "$FOLDER/m"
findmnt -nro SOURCE,FSTYPE "$FOLDER/m"
mount -a                                    # it is mounted already
findmnt -nro TARGET -t fuse.pbsfs | grep "^$FOLDER/" | wc -l
cat "$FOLDER/m/qemu-server.conf" | cmp - "$FOLDER/configuration"
umount "$FOLDER/m"
mount -t fuse.pbsfs -o ro,noexec "$FOLDER/datastore" "$FOLDER/m"
findmnt -nro SOURCE,FSTYPE "$FOLDER/m"
umount "$FOLDER/m"
mount -t pbsfs -o fancy "$FOLDER/datastore" "$FOLDER/m" || echo "status $?"
findmnt -nro TARGET -t fuse.pbsfs | grep "^$FOLDER/" | wc -l
"""


@pytest.mark.mount
@pytest.mark.root
def test_mount_8_mounts_lines_of_fstab(stocked: Stocked, tmp_path: Path) -> None:
    need_root("change /usr/sbin and fstab in a mount namespace of its own")
    need_fuse()
    need("unshare", "findmnt")
    (tmp_path / "o").mkdir()
    code = "from pbsfs.cli.mount_helper import main; main()"
    (tmp_path / "helper").write_text(f"#!/bin/sh\nexec '{sys.executable}' -c '{code}' \"$@\"\n")
    (tmp_path / "helper").chmod(0o755)
    (tmp_path / "configuration").write_bytes(stocked.contents[CONFIGURATION])
    source = f"{stocked.path}:{FIRST}"
    (tmp_path / "fstab").write_text(
        f"{source} {tmp_path}/m pbsfs nofail,_netdev,uid=1,x-systemd.automount 0 0\n"
    )
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", MOUNT_8],
        env=environment(FOLDER=str(tmp_path)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.splitlines() == [
        f"{source} fuse.pbsfs",
        "1",
        f"{stocked.path} fuse.pbsfs",
        "status 1",
        "0",
    ], done.stderr
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)
    assert "mount option 'fancy' is not known" in done.stderr
