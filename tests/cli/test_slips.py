"""Slips of scripts and fingers: told in one line, and nothing is done in a place that nobody named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.mounts import mounted
from tests.support.needs import need
from tests.support.program import PBSFS, environment, error_of, pbsfs, run
from tests.support.stocked import Stocked

IMAGE = "vm/100/latest/drive-scsi0.img"


@pytest.mark.parametrize(
    "arguments",
    [
        ["ls", "--datastore-dir", ""],
        ["ls", "--keyfile", ""],
        ["ls", "--log-file", ""],
        ["mount", "--datastore-dir", "/nowhere", ""],
        ["umount", ""],
        ["export", "--datastore-dir", "/nowhere", IMAGE, ""],
        ["key", "show", ""],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_an_empty_path_is_not_the_current_directory(arguments: list[str], tmp_path: Path) -> None:
    assert "the path is empty" in error_of(pbsfs(*arguments, cwd=tmp_path), 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", ["nan", "inf", "-1", "soon"])
@pytest.mark.parametrize("option", ["--retry-timeout", "--refresh"])
def test_what_is_no_number_of_seconds_is_refused(option: str, number: str, tmp_path: Path) -> None:
    error_of(pbsfs("mount", option, number, tmp_path), 2)


def test_wrong_usage_is_one_line_too() -> None:
    text = error_of(pbsfs("mount"), 2)
    assert text == (
        "Missing argument '[SOURCE] MOUNTPOINT'. Usage: pbsfs mount [OPTIONS] [SOURCE] MOUNTPOINT"
    )


def test_an_export_with_one_path_misses_the_place_and_not_the_path() -> None:
    text = error_of(pbsfs("export", "--datastore-dir", "/nowhere", IMAGE), 2)
    assert text.startswith("Missing argument 'DEST', the place to copy to. Usage: pbsfs export ")


def test_an_export_to_a_file_of_others_is_refused_for_what_it_writes(
    stocked: Stocked, tmp_path: Path
) -> None:
    need("setpriv")
    (dest := tmp_path / "disk.img").write_bytes(b"theirs")
    dest.chmod(0)
    words: list[str | Path] = [PBSFS, "export", "--datastore-dir", stocked.path, IMAGE, dest]
    # Root may read it without these two.
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    assert error_of(run([*drop, *words]), 8).endswith(
        "disk.img exists; remove it, or overwrite it with --force"
    )


def test_without_a_source_the_error_names_the_ways_to_one() -> None:
    text = error_of(pbsfs("ls"), 2)
    assert text.startswith("no source: name a server with --repository or PBS_REPOSITORY")
    assert text.endswith("or a profile with --profile or PBSFS_PROFILE, which pbsfs config init writes")


@pytest.mark.parametrize(
    ("word", "advice"),
    [
        ("unmount", "did you mean: pbsfs umount"),
        ("restore", "did you mean: pbsfs export"),
        ("snapshots", "did you mean: pbsfs ls"),
        ("catalog", "did you mean: pbsfs ls files, or pbsfs find"),
        ("tar", "did you mean: pbsfs export --format tar"),
        ("verfy", "did you mean: pbsfs verify"),
        ("qqq", "pbsfs --help lists the commands"),
        ("backup", "pbsfs only reads backups: make them with proxmox-backup-client backup"),
        ("prune", "pbsfs only reads backups: prune them on the server"),
        ("forget", "pbsfs only reads backups: remove them with "),
        ("df", "run df on a mount of pbsfs"),
        ("du", "did you mean: pbsfs ls -l"),
    ],
)
def test_a_command_by_habit_gets_the_right_one(word: str, advice: str) -> None:
    text = error_of(pbsfs(word, "x"), 2)
    assert text.startswith(f"there is no command '{word}'; {advice}")


@pytest.mark.parametrize(
    ("option", "meant"),
    [("--namespace", "--ns"), ("-r", "--repository"), ("-v", "--log-level debug")],
)
def test_an_option_by_habit_gets_the_right_one(option: str, meant: str) -> None:
    text = error_of(pbsfs("ls", option, "x"), 2)
    assert text.startswith(f"No such option '{option}'; did you mean: {meant}? Usage: pbsfs ls ")


def test_an_option_by_habit_may_mean_another_one_to_a_command() -> None:
    text = error_of(pbsfs("find", "files", "-name", "fstab"), 2)
    assert text.startswith("No such option '-n'; did you mean: --name? Usage: pbsfs find ")
    text = error_of(pbsfs("find", "-r", "fstab"), 2)
    assert text.startswith("No such option '-r'; did you mean: --regex? Usage: pbsfs find ")


@pytest.mark.parametrize("option", ["-r", "--recursive"])
def test_diff_is_recursive_without_an_option(option: str) -> None:
    text = error_of(pbsfs("diff", option, "a", "b"), 2)
    assert text.startswith(f"No such option '{option}'; leave it out: diff always compares all ")


@pytest.mark.parametrize("option", ["--datastore-dir", "-v"])
def test_an_option_before_the_command_is_sent_behind_it(option: str) -> None:
    text = error_of(pbsfs(option, "x", "ls"), 2)
    assert text.startswith(f"No such option '{option}' before the command; write options after it. Usage: ")


def test_key_files_that_can_not_be_read_are_named_as_such(tmp_path: Path) -> None:
    text = error_of(pbsfs("key", "show", tmp_path / "nokey"), 19)
    assert text.startswith(f"key file {tmp_path}/nokey: No such file or directory; ")


def test_a_destination_that_should_be_a_directory_does_not_become_a_file(
    stocked: Stocked, tmp_path: Path
) -> None:
    missing = tmp_path / "missing"
    text = error_of(pbsfs("export", "--datastore-dir", stocked.path, IMAGE, f"{missing}/"), 8)
    assert text == f"cannot write {missing}/: it is not a directory; create it with mkdir"
    text = error_of(pbsfs("export", "--datastore-dir", stocked.path, IMAGE, missing / "copy"), 8)
    assert text.endswith(f"; there is no directory {missing}: create it with mkdir")
    assert not missing.exists()


def test_a_master_key_is_not_a_key_file(tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_text("-----BEGIN PRIVATE KEY-----\n")
    text = error_of(pbsfs("key", "show", tmp_path / "key.pem"), 19)
    assert "pbsfs key recover --master-key" in text


@pytest.mark.mount
def test_empty_mount_options_are_none(stocked: Stocked, tmp_path: Path) -> None:
    with mounted(stocked.path, tmp_path / "m", "-o", "") as mount:
        assert (mount / "vm").is_dir()


def test_a_pipe_that_nobody_reads_is_not_waited_for(stocked: Stocked, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    text = error_of(pbsfs("export", "--datastore-dir", stocked.path, IMAGE, pipe), 8)
    assert text == f"nothing reads from {pipe}; start the program that reads it first"


def test_a_password_in_the_repository_is_not_repeated() -> None:
    text = error_of(pbsfs("ls", "--repository", "reader@pbs:hunter2@pbs.example.com:store1"), 2)
    assert "PBS_PASSWORD" in text
    assert "hunter2" not in text


def test_an_empty_password_is_none() -> None:
    told = environment(PBS_PASSWORD="", PBS_FINGERPRINT="00" * 32)
    text = error_of(pbsfs("ls", "--repository", "reader@pbs@localhost:store1", env=told), 2)
    assert text.startswith("no password for reader@pbs")


def test_a_namespace_that_is_not_there_is_named_and_not_its_path(stocked: Stocked) -> None:
    text = error_of(pbsfs("ls", "--datastore-dir", stocked.path, "--ns", "no/such"), 3)
    assert text.endswith("there is no namespace 'no/such'; there is prod")
