"""That the benchmarks still run. What they measure is looked at by hand."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from bench import disks, report
from tests.support.needs import need
from tests.support.program import PBSFS, output_of, run

CHECKOUT = Path(__file__).resolve().parent.parent


def bench(*arguments: str | Path) -> str:
    """What `python -m bench ARGUMENTS` prints, when it succeeds."""
    done = run([sys.executable, "-m", "bench", *arguments], cwd=CHECKOUT)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_one_runs_on_small_data(tmp_path: Path) -> None:
    said = bench(
        *("--quick", "--repeat", "1", "--only", "export", "--data", tmp_path),
        *("--json", tmp_path / "found.json", "--plots", tmp_path / "plots"),
    )
    (result,) = json.loads((tmp_path / "found.json").read_text())["results"]
    assert result["name"] == "export"
    assert result["error"] is None
    assert "pbsfs export" in said
    assert all(sample["seconds"] > 0 for samples in result["samples"].values() for sample in samples)
    assert ET.parse(tmp_path / "plots/export.svg").getroot().tag.endswith("svg")


def test_the_disks_hold_as_many_entries_as_they_say(tmp_path: Path) -> None:
    need("mke2fs")
    machine = disks.make(tmp_path, quick=True)
    assert {disks.ROOT, disks.DATA} <= set(machine.volumes)
    for volume in machine.volumes.values():
        source = ("--datastore-dir", machine.datastore)
        found = output_of(PBSFS, "find", "--no-progress", *source, volume.shown).splitlines()
        assert len(found) == volume.entries, volume.name
        assert machine.chunks(volume.name)
        if volume.name != disks.DATA:
            assert "root:x:0:0" in output_of(PBSFS, "cat", *source, f"{volume.shown}/{disks.SOME_FILE}")
        if volume.name == disks.XFS:
            assert "replayed: " in output_of(PBSFS, "info", *source, volume.shown)


def test_they_run_where_git_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert report.machine()["commit"] == ""


def test_all_of_them_are_listed() -> None:
    listed = [line.split()[0] for line in bench("--list").splitlines()]
    assert {"export", "nbd", "mount", "directory", "slow-link", "memory"} <= set(listed)
    assert len(listed) == len(set(listed))
