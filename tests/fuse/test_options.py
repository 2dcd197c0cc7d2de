"""The options of mount(8): all of them are understood, passed on or refused by name."""

from __future__ import annotations

import os

import pytest

from pbsfs.base.errors import UsageError
from pbsfs.fuse.options import FuseOptions


def test_without_options_files_belong_to_the_caller_and_its_group() -> None:
    options = FuseOptions.parse([])

    assert (options.uid, options.gid) == (os.getuid(), os.getgid())
    assert options.umask == 0o007
    assert (options.nonempty, options.flags) == (False, set())


def test_options_come_one_by_one_or_with_commas() -> None:
    joined = FuseOptions.parse(["allow_other,uid=1000,gid=33,umask=0022,nonempty"])
    apart = FuseOptions.parse(["allow_other", "uid=1000", "gid=33", "", "umask=22", "nonempty,"])

    assert joined == apart
    assert (joined.uid, joined.gid, joined.umask) == (1000, 33, 0o022)
    assert joined.nonempty
    assert joined.flags == {"allow_other"}


def test_options_of_mount_8_that_mean_nothing_here_are_taken() -> None:
    general = "ro,defaults,noauto,nofail,_netdev,user,x-systemd.automount,X-mount.mkdir,comment=x,relatime,"
    general += "nodiratime,strictatime,lazytime,silent"
    assert FuseOptions.parse([general]) == FuseOptions()


@pytest.mark.parametrize("option", ["allow_root", "nosuid", "nodev", "noexec", "noatime", "exec"])
def test_options_of_libfuse_are_passed_on(option: str) -> None:
    assert FuseOptions.parse([option]).flags == {option}


@pytest.mark.parametrize("option", ["suid", "dev"])
def test_files_in_backups_get_no_privileges(option: str) -> None:
    with pytest.raises(UsageError, match=f"mount option {option}: files in backups get no privileges"):
        FuseOptions.parse(["ro", option])


def test_owners_are_as_stored_where_root_mounts(monkeypatch: pytest.MonkeyPatch) -> None:
    for user, as_stored in ((0, True), (1000, False)):
        monkeypatch.setattr(os, "geteuid", lambda user=user: user)
        assert FuseOptions.parse([]).as_stored is as_stored
        assert not FuseOptions.parse(["ignore_permissions"]).as_stored
        assert FuseOptions.parse(["noignore_permissions"]).as_stored


def test_files_can_be_left_out() -> None:
    assert FuseOptions.parse([]).files
    assert not FuseOptions.parse(["nofiles"]).files


def test_names_without_colons_can_be_chosen_and_unchosen() -> None:
    assert not FuseOptions.parse([]).safe_names
    assert FuseOptions.parse(["safe_names"]).safe_names
    assert not FuseOptions.parse(["safe_names", "nosafe_names"]).safe_names  # of a profile, and the caller


@pytest.mark.parametrize(
    ("option", "name"), [("fsname=home:vm/100", "home:vm/100"), ("fsname=a\\,b=\\\\", "a,b=\\")]
)
def test_the_name_in_the_mount_table_may_have_commas(option: str, name: str) -> None:
    options = FuseOptions.parse([option, "allow_other"])
    assert (options.fsname, options.flags) == (name, {"allow_other"})
    assert FuseOptions.parse([]).fsname is None


@pytest.mark.parametrize("option", ["rw", "remount"])
def test_writing_is_refused(option: str) -> None:
    with pytest.raises(UsageError, match="mounted read-only"):
        FuseOptions.parse(["ro", option])


@pytest.mark.parametrize(
    "option",
    [
        "uid",
        "uid=",
        "uid=root",
        "uid=-1",
        "uid=4294967295",
        "gid=1_0",
        "gid= 1",
        "umask=8",
        "umask=1777",
        "umask=-1",
    ],
)
def test_a_number_out_of_range_is_refused(option: str) -> None:
    with pytest.raises(UsageError, match="not a number from 0 to"):
        FuseOptions.parse([option])


@pytest.mark.parametrize("option", ["allow_others", "big_writes", "uids=1", "fsname=", "ro=1", "nonempty=1"])
def test_an_option_that_is_not_known_is_refused_by_name(option: str) -> None:
    name, _equals, value = option.partition("=")
    shown = f"{name}=…" if value else option  # other users may read the log, and the value may be a secret
    with pytest.raises(UsageError, match=f"'{shown}' is not known"):
        FuseOptions.parse([option])


def test_two_sets_of_options_share_nothing() -> None:
    FuseOptions.parse(["allow_other"])
    assert FuseOptions.parse([]).flags == set()
