"""`pbsfs ls`: the tree, without a mount."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from tests.support import damage
from tests.support.mounts import mounted
from tests.support.program import PBSFS, environment, error_of, output_of, pbsfs
from tests.support.server import ReferenceServer
from tests.support.serving import access
from tests.support.stocked import CONFIGURATION, ENCRYPTED, FIRST, IMAGE, SECOND, Stocked, stock
from tests.support.terminal import at_a_terminal


def ls(stocked: Stocked, *arguments: str) -> list[str]:
    return output_of(PBSFS, "ls", "--datastore-dir", stocked.path, *arguments).splitlines()


def test_the_root_is_listed_unless_a_path_is_given(stocked: Stocked) -> None:
    assert ls(stocked) == ls(stocked, "/") == ["vm", "ct", "ns", "files"]
    assert ls(stocked, "vm/100") == ["2023-11-14T22:13:20Z", "2023-11-15T22:13:20Z", "latest"]
    assert sorted(ls(stocked, f"/{FIRST}/")) == [
        "client.log",
        "drive-scsi0.img",
        "index.json",
        "qemu-server.conf",
    ]


def test_links_are_followed(stocked: Stocked) -> None:
    assert sorted(ls(stocked, "vm/100/latest")) == ["drive-scsi0.img", "index.json"]


def test_a_file_is_listed_as_itself(stocked: Stocked) -> None:
    assert ls(stocked, IMAGE) == ["drive-scsi0.img"]


def test_the_namespace_is_the_root(stocked: Stocked) -> None:
    assert ls(stocked, "--ns", "prod") == ["vm", "files"]
    assert ls(stocked, "--ns", "prod", "vm/100/latest") == ls(stocked, "ns/prod/vm/100/latest")


def test_long_shows_mode_size_data_and_time(stocked: Stocked) -> None:
    lines = [line.split() for line in ls(stocked, "-l", FIRST)]
    rows = {line[6]: line[:6] for line in lines}
    file = ["-r--r-----", "-", "-"]
    assert rows["drive-scsi0.img"] == [*file, "525824", "329216", "2023-11-14T22:13:20Z"]
    size = str(len(stocked.contents[CONFIGURATION]))
    assert rows["qemu-server.conf"] == [*file, size, size, "2023-11-14T22:13:20Z"]
    group = [line.split() for line in ls(stocked, "-l", "vm/100")]
    assert group[0] == ["dr-xr-x---", *"----", "2023-11-14T22:13:20Z", "2023-11-14T22:13:20Z/"]
    assert group[2][0] == "lrwxrwxrwx"
    assert group[2][6:] == ["latest", "->", "2023-11-15T22:13:20Z"]


def test_recursive_shows_every_file_a_mount_would(stocked: Stocked) -> None:
    listed = ls(stocked, "-R")
    assert {*stocked.contents, ENCRYPTED, "vm/100/latest"} <= set(listed)
    assert len(listed) == len(set(listed))
    assert f"{FIRST}/drive-scsi0.img".removeprefix("vm/") in ls(stocked, "--recursive", "vm")


def test_json_is_for_programs(stocked: Stocked) -> None:
    rows = {row["path"]: row for row in json.loads("\n".join(ls(stocked, "--json", "-R")))}
    assert rows[IMAGE] == {
        "name": IMAGE,
        "path": IMAGE,
        "type": "file",
        "size": 525824,
        "data_size": 329216,
        "time": "2023-11-14T22:13:20Z",
    }
    assert rows["vm/100/latest"]["target"] == "2023-11-15T22:13:20Z"
    assert rows[FIRST]["type"] == "directory"
    assert {*stocked.contents, ENCRYPTED} <= set(rows)


def test_what_does_not_exist_is_status_3_and_tells_what_does(stocked: Stocked) -> None:
    text = error_of(pbsfs("ls", "--datastore-dir", stocked.path, "vm/100/lates"), 3)
    assert text == "vm/100: there is no 'lates'; there is 2023-11-14T22:13:20Z, 2023-11-15T22:13:20Z, latest"
    assert "not a directory" in error_of(pbsfs("ls", "--datastore-dir", stocked.path, f"{IMAGE}/x"), 3)
    error_of(pbsfs("ls", "--datastore-dir", stocked.path, "--ns", "none"), 3)
    error_of(pbsfs("ls", "--datastore-dir", stocked.path, "vm/../ct"), 2)
    error_of(pbsfs("ls", "--datastore-dir", stocked.path, "--ns", "a b"), 2)


def test_a_source_that_cannot_be_read_is_status_4(tmp_path: Path) -> None:
    missing = tmp_path / "none"
    assert error_of(pbsfs("ls", "--datastore-dir", missing), 4) == (
        f"cannot read datastore {missing}: No such file or directory; "
        "check the name, and that the disk with the datastore is mounted"
    )
    assert "is not a datastore" in error_of(pbsfs("ls", "--datastore-dir", tmp_path), 4)


def test_a_broken_snapshot_hides_none_of_its_neighbours(tmp_path: Path) -> None:
    own = stock(tmp_path / "datastore")
    damage.truncate(own.path / SECOND / "index.json.blob", 20)
    done = pbsfs("ls", "--datastore-dir", own.path, "-R", "--log-level", "error")
    assert done.returncode == 6
    assert {FIRST, IMAGE, SECOND, ENCRYPTED} <= set(done.stdout.splitlines())
    assert f"pbsfs: {SECOND}: unreadable manifest" in done.stderr
    done = pbsfs("ls", "--datastore-dir", own.path, "--log-level", "error", SECOND)
    text = error_of(done, 6)
    assert "unreadable manifest" in text
    assert text.endswith("; read another snapshot, and verify the datastore to see what else is damaged")


def test_names_go_to_the_terminal_as_they_are_and_nothing_else_does(tmp_path: Path) -> None:
    own = stock(tmp_path / "datastore")
    (own.path / "vm" / "\x1b[31mred").mkdir()
    (own.path / "vm" / "lost+found").mkdir()
    assert ls(own, "vm") == ["100", "101"]


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    # The output has to be more than a pipe holds.
    own = stock(tmp_path / "datastore")
    for number in range(2000):
        (own.path / "vm" / f"{number:0200d}").mkdir()
    command = f"'{PBSFS}' ls --datastore-dir '{own.path}' vm | head -n 1; echo ${{PIPESTATUS[0]}}"
    shown = output_of("bash", "-c", command, env=environment())
    assert shown.splitlines()[0] == "0" * 200
    assert shown.splitlines()[1] == "141"


# --- for people


def test_sizes_may_have_units_and_help_is_help_only(stocked: Stocked) -> None:
    (line,) = ls(stocked, "-lh", IMAGE)
    file = ["-r--r-----", "-", "-", "514KiB", "322KiB", "2023-11-14T22:13:20Z", "drive-scsi0.img"]
    assert line.split() == file
    assert ls(stocked, "-h", "vm") == ["100", "101"]
    assert output_of(PBSFS, "ls", "--help").startswith("Usage: pbsfs ls ")


def test_several_paths_are_listed_one_after_the_other(stocked: Stocked) -> None:
    assert ls(stocked, "vm", IMAGE, "ct") == ["vm:", "100", "101", "drive-scsi0.img", "", "ct:", "200"]
    rows = json.loads("\n".join(ls(stocked, "--json", "vm", "ct")))
    assert [row["path"] for row in rows] == ["vm/100", "vm/101", "ct/200"]


def test_a_path_that_does_not_exist_hides_none_of_the_others(stocked: Stocked) -> None:
    done = pbsfs("ls", "--datastore-dir", stocked.path, "vm/999", "ct")
    assert (done.returncode, done.stdout) == (3, "ct:\n200\n")
    assert done.stderr == "pbsfs: vm: there is no '999'; there is 100, 101\n"


def test_a_tree_has_branches_down_to_a_level(stocked: Stocked) -> None:
    assert ls(stocked, "--tree", "-L", "2", "vm") == [
        "vm",
        "├── 100",
        "│   ├── 2023-11-14T22:13:20Z",
        "│   ├── 2023-11-15T22:13:20Z",
        "│   └── latest",
        "└── 101",
        "    ├── 2023-11-14T22:13:20Z",
        "    └── latest",
    ]
    whole = ls(stocked, "--tree", "vm")
    assert len(whole) == 1 + len(ls(stocked, "-R", "vm"))
    assert "│   │   ├── drive-scsi0.img" in whole
    assert ls(stocked, "--tree", "--level=1") == ["/", "├── vm", "├── ct", "├── ns", "└── files"]
    assert ls(stocked, "-R", "-L", "1", "vm") == ["100", "101"]
    assert "-L goes with -R or --tree" in error_of(pbsfs("ls", "-L", "2", "vm"), 2)
    plain = environment(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    drawn = output_of(PBSFS, "ls", "--datastore-dir", stocked.path, "--tree", "vm", "-L1", env=plain)
    assert drawn.splitlines() == ["vm", "|-- 100", "`-- 101"]


def test_a_terminal_gets_a_header_and_aligned_columns(tmp_path: Path) -> None:
    own = stock(tmp_path / "datastore")
    words = [str(PBSFS), "ls", "--datastore-dir", str(own.path), "-lh", FIRST, "ct"]
    status, shown = at_a_terminal(words, [], environment())
    lines = shown.splitlines()
    assert status == 0
    assert lines[0] == f"{FIRST}:"
    assert lines[1] == "      MODE UID GID   SIZE   DATA                 TIME NAME"
    assert "-r--r-----   -   - 514KiB 322KiB 2023-11-14T22:13:20Z drive-scsi0.img" in lines
    blank = lines.index("")
    assert {line.index("2023") for line in lines[2:blank]} == {lines[1].index("TIME") - 16}
    assert lines[blank + 1] == "ct:"
    assert len(lines[blank + 2 :]) == 2  # its own header, and the group
    assert max(map(len, lines)) <= 80
    status, shown = at_a_terminal([PBSFS, "ls", "--datastore-dir", own.path, "vm"], [], environment())
    assert shown.split() == ["100", "101"]


@pytest.mark.mount
@pytest.mark.parametrize("kind", ["directory", "server"])
def test_modes_are_those_of_a_mount(
    stocked: Stocked, server: ReferenceServer, tmp_path: Path, kind: str
) -> None:
    told = access(server) if kind == "server" else environment(PBSFS_DATASTORE_DIR=str(stocked.path))
    with mounted(told, tmp_path / "m") as mount:
        shown = {
            path: stat.filemode((mount / path).lstat().st_mode)
            for path in ("vm/100", FIRST, IMAGE, CONFIGURATION, "vm/100/latest")
        }
    for path, mode in shown.items():
        above, _slash, name = path.rpartition("/")
        lines = [line.split() for line in output_of(PBSFS, "ls", "-l", above, env=told).splitlines()]
        assert {line[6].rstrip("/"): line[0] for line in lines}[name] == mode
