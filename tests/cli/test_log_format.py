"""The log as JSON, of the real program: one object in a line, also for what goes wrong at the end."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.mounts import cleaned_up
from tests.support.needs import need_fuse
from tests.support.program import PBSFS, environment, error_of, pbsfs
from tests.support.stocked import CHUNK, IMAGE, Stocked, stock
from tests.support.waiting import wait_until


def entries(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_an_error_is_one_object_with_the_exit_status(stocked: Stocked) -> None:
    ls = ("ls", "--datastore-dir", stocked.path, "vm/none")
    text = error_of(pbsfs(*ls), 3)
    for done in (
        pbsfs(*ls, "--log-format", "json"),
        pbsfs(*ls, env=environment(PBSFS_LOG_FORMAT="json")),
    ):
        (entry,) = entries(done.stderr)
        assert (done.returncode, entry["exit_status"]) == (3, 3)
        assert (entry["level"], entry["logger"], entry["message"]) == ("error", "pbsfs", text)
    assert error_of(pbsfs(*ls, "--log-format", "text", env=environment(PBSFS_LOG_FORMAT="json")), 3) == text


def test_an_unknown_format_is_refused(stocked: Stocked) -> None:
    ls = ("ls", "--datastore-dir", stocked.path)
    assert "'xml' is not text or json" in error_of(pbsfs(*ls, "--log-format", "xml"), 2)
    assert "PBSFS_LOG_FORMAT" in error_of(pbsfs(*ls, env=environment(PBSFS_LOG_FORMAT="xml")), 2)


def test_a_damaged_range_is_in_fields(tmp_path: Path) -> None:
    own = stock(tmp_path / "datastore")
    part = own.contents[IMAGE][CHUNK : 2 * CHUNK]
    own.writer.chunk_path(hashlib.sha256(part).digest()).unlink()
    done = pbsfs(
        *("export", "--datastore-dir", own.path, "--on-damage", "zero", "--log-format", "json"),
        *(IMAGE, tmp_path / "copy"),
    )
    found = entries(done.stderr)
    (damage,) = [entry for entry in found if "shown as zeros" in entry["message"]]
    assert damage["image"].endswith("drive-scsi0.img")
    assert (damage["offset"], damage["length"]) == (CHUNK, CHUNK)


@pytest.mark.mount
@pytest.mark.parametrize("way", ["option", "profile"])
def test_a_mount_logs_json(stocked: Stocked, tmp_path: Path, way: str) -> None:
    need_fuse()
    (place := tmp_path / "m").mkdir()
    options = ["--log-format", "json"] if way == "option" else []
    (tmp_path / "pbsfs").mkdir()
    (tmp_path / "pbsfs" / "config.toml").write_text(
        f'[profiles.home]\ndatastore-dir = "{stocked.path}"\n'
        + ('log-format = "json"\n' if way == "profile" else "")
    )
    env = environment(XDG_CONFIG_HOME=str(tmp_path))
    command = [PBSFS, "mount", "-f", "--log-level", "info", *options, "home:", str(place)]
    with (
        cleaned_up(place),
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process,
    ):
        try:
            wait_until((place / "vm").exists, "it is mounted")
            assert pbsfs("umount", place).returncode == 0
            _nothing, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0
    last = entries(errors)[-1]
    assert (last["level"], last["logger"]) == ("info", "pbsfs.fuse.mount")
    assert last["message"] == f"{place} was unmounted"


@pytest.mark.mount
def test_a_mount_in_the_background_writes_json_to_its_file(stocked: Stocked, tmp_path: Path) -> None:
    need_fuse()
    (place := tmp_path / "m").mkdir()
    log = tmp_path / "log"
    with cleaned_up(place):
        words = ("--log-level", "info", "--log-file", log, "--log-format", "json")
        done = pbsfs("mount", *words, "--datastore-dir", stocked.path, place)
        assert (done.returncode, done.stderr) == (0, "")
        assert pbsfs("umount", place).returncode == 0
        wait_until(lambda: "was unmounted" in log.read_text(), "the log tells of the end")
    assert all(entry["time"].endswith("Z") for entry in entries(log.read_text()))
