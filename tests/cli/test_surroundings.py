"""Surroundings that lack what programs expect: a home, a name of the user, a place to write, a locale."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support import made
from tests.support.needs import need, need_fuse, need_root
from tests.support.program import PBSFS, environment, error_of, run
from tests.support.serving import without
from tests.support.stocked import CONFIGURATION, IMAGE, Stocked, stock

NO_SYSLOG = "[ ! -e /dev/log ] || mount --bind /dev/null /dev/log; "
NO_NAMES = "for file in passwd nsswitch.conf; do mount --bind /dev/null /etc/$file; done; "
NOT_WRITABLE = "".join(
    f"mount --rbind {place} {place}; mount -o remount,bind,ro {place}; " for place in ("/", "/tmp")
)
NOWHERE = "".join(f"mount -t tmpfs -o ro none {place}; " for place in ("/run", "/dev/shm"))
MOUNT = '"$0" mount --datastore-dir "$1" "$2" && cat "$2/$3" && "$0" umount "$2"'

HOMELESS = without(environment(), "HOME", "XDG_RUNTIME_DIR", "XDG_STATE_HOME", "XDG_CONFIG_HOME")


@pytest.fixture
def stocked(tmp_path: Path) -> Stocked:
    (tmp_path / "m").mkdir()
    return stock(tmp_path / "datastore")


def confined(script: str, *arguments: str | Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """What a shell script does that has a mount table of its own, and no home."""
    need_root("mount file systems")
    need("unshare")
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script, PBSFS, *arguments]
    return run(command, env=HOMELESS | changes)


@pytest.mark.mount
@pytest.mark.parametrize("missing", ["names", "home", "writable root"])
def test_a_mount_works_without_a_home_a_name_or_a_place_to_write(
    stocked: Stocked, tmp_path: Path, missing: str
) -> None:
    need_fuse()
    setup = {"names": NO_NAMES, "home": "", "writable root": NOT_WRITABLE}[missing]
    changes = {} if missing == "names" else {"HOME": "/nonexistent", "TMPDIR": "/tmp"}
    script = NO_SYSLOG + setup + MOUNT
    done = confined(script, stocked.path, tmp_path / "m", CONFIGURATION, **changes)
    assert (done.returncode, done.stdout.encode()) == (0, stocked.contents[CONFIGURATION])
    (line,) = done.stderr.splitlines()
    assert line.startswith("pbsfs: the log goes nowhere: there is no syslog, and no file can be written")
    assert not Path("/nonexistent").exists()


def test_commands_work_for_a_user_without_a_name_and_a_home(stocked: Stocked, tmp_path: Path) -> None:
    done = confined(NO_NAMES + '"$0" ls --datastore-dir "$1" vm', stocked.path)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["100", "101"], "")
    done = confined(NO_NAMES + '"$0" ls --repository localhost:1:store', PBS_PASSWORD="x")
    assert "cannot connect to localhost:1" in error_of(done, 14)


def test_images_are_served_where_only_shared_memory_can_be_written(stocked: Stocked) -> None:
    need("nbdkit", "nbdinfo")
    script = NOT_WRITABLE + NOWHERE + "mount -t tmpfs none /dev/shm; "
    script += '"$0" nbd --datastore-dir "$1" "$2" --run \'nbdinfo --size "$uri"; echo "$uri"\''
    done = confined(script, stocked.path, IMAGE, TMPDIR="/tmp")
    size, uri = done.stdout.split()
    assert (done.returncode, done.stderr, int(size)) == (0, "", len(stocked.contents[IMAGE]))
    directory = Path(uri.partition("socket=")[2]).parent
    assert directory.parent == Path("/dev/shm")


def test_without_any_place_for_a_socket_it_is_said_what_to_do(stocked: Stocked) -> None:
    need("nbdkit")
    script = NOT_WRITABLE + NOWHERE + '"$0" nbd --datastore-dir "$1" "$2"'
    done = confined(script, stocked.path, IMAGE, TMPDIR="/tmp")
    assert error_of(done, 9) == (
        "no place for a private directory: cannot write to /tmp, /run, /dev/shm; "
        "set TMPDIR to a directory that can be written, with a short path"
    )


def test_a_failure_of_the_system_is_not_one_of_standard_output(stocked: Stocked) -> None:
    need("prlimit")
    done = run(["prlimit", "--nofile=6", PBSFS, "ls", "--datastore-dir", stocked.path])
    assert error_of(done, 1) == "Too many open files; --log-level debug shows where"


def test_at_the_limit_of_tasks_a_command_fails_with_one_line() -> None:
    need_root("run programs as other users")
    need("prlimit", "setpriv")
    user = 1_000_000 + os.getpid()  # has no other tasks
    command = ["setpriv", f"--reuid={user}", "--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
    command += ["prlimit", "--nproc=1", PBSFS, "ls", "--repository", "localhost:1:store"]
    done = run([*command, "--retry-timeout", "0"], env=environment(PBS_PASSWORD="x"))
    assert error_of(done, 4) == (
        "can't start new thread; end other programs, or allow more tasks to this user or service "
        "(ulimit -u, TasksMax=)"
    )


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_are_nothing_to_stumble_over(stocked: Stocked, closed: str) -> None:
    done = run(["sh", "-c", f'"$0" ls --datastore-dir "$1" {closed}', PBSFS, stocked.path])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == ("" if ">&-" in closed.replace("2>&-", "") else "vm\nct\nns\nfiles\n")


# --- locales


@pytest.fixture(scope="module")
def latin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables of a locale that has no UTF-8."""
    need("localedef")
    folder = tmp_path_factory.mktemp("locales")
    done = run(["localedef", "-i", "de_DE", "-f", "ISO-8859-15", folder / "de_DE.ISO-8859-15"])
    if done.returncode != 0:
        need("the sources of locales (package locales)")
    return {"LOCPATH": str(folder), "LC_ALL": "de_DE.ISO-8859-15"}


def shown_in(told: dict[str, str], *arguments: str | bytes | Path) -> tuple[int, bytes, bytes]:
    """Status, output and errors of a command, as bytes."""
    done = subprocess.run(
        [PBSFS, *arguments], capture_output=True, timeout=60, check=False, env=environment(**told)
    )
    assert b"Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def test_any_text_is_shown_in_any_locale(latin: dict[str, str], stocked: Stocked) -> None:
    stocked.writer.add_snapshot(made.snapshot("300"), {"a.conf.blob": b"x"}, notes="für 5 € ☃")
    for told, notes in ((latin, "für 5 € ?".encode("iso-8859-15")), ({"LC_ALL": "C"}, "für 5 € ☃".encode())):
        status, output, errors = shown_in(told, "info", "--datastore-dir", stocked.path, "vm/300/latest")
        assert (status, errors) == (0, b"")
        assert notes in output
        assert shown_in(told, "--help")[0] == 0
        assert shown_in(told, "ls", "-R", "--json", "--datastore-dir", stocked.path)[0] == 0
        for name in ("nöwhere ☃".encode(), b"/n\xff\x1b[31m"):
            status, output, errors = shown_in(told, "ls", "--datastore-dir", name)
            assert (status, output, errors.count(b"\n")) == (4, b"", 1)
            assert b"\x1b" not in errors
            assert shown_in(told, "ls", b"--" + name)[0] == 2


def test_a_locale_that_is_not_there_is_as_good_as_any(stocked: Stocked) -> None:
    status, output, _errors = shown_in({"LC_ALL": "xx_XX"}, "ls", "--datastore-dir", stocked.path)
    assert (status, output) == (0, b"vm\nct\nns\nfiles\n")


def test_log_files_are_utf_8_in_any_locale(latin: dict[str, str], stocked: Stocked, tmp_path: Path) -> None:
    os.rename(stocked.path, away := tmp_path / "weg ☃")
    (away / "vm/100/2023-11-15T22:13:20Z/index.json.blob").unlink()
    log = tmp_path / "log"
    assert shown_in(latin, "ls", "--datastore-dir", away, "--log-file", log, "vm/100")[0] == 0
    assert "left out" in log.read_text(encoding="utf-8")
