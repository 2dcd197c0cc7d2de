"""What all commands have in common: help, versions, statuses, completion, and no tracebacks."""

from __future__ import annotations

import os
import re
import select
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import pbsfs as package
from pbsfs.base.errors import PbsfsError
from pbsfs.cli import _COMMANDS, _Output
from pbsfs.sources.pacing import DEFAULT_LIMIT
from pbsfs.testing.archives import Node, write
from pbsfs.testing.writer import DatastoreWriter
from tests.support import made
from tests.support.program import PBSFS, environment, error_of, output_of, pbsfs, run
from tests.support.stocked import CONFIGURATION, IMAGE, stock

READING = [["ls"], ["info", "vm/100"], ["export", "vm/100/latest/a.img", "-"], ["mount", "."]]


def test_the_program_and_the_module_are_the_same() -> None:
    version = f"pbsfs {package.__version__}\n"
    assert output_of(PBSFS, "--version") == version
    assert output_of(sys.executable, "-m", "pbsfs", "--version") == version
    assert output_of(sys.executable, "-m", "pbsfs", "--help") == output_of(PBSFS, "-h")


def test_output_waits_for_its_reader_where_another_program_made_it_non_blocking(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader, writer = os.pipe()
    with open(reader, "rb", buffering=0) as reading, open(writer, "wb", buffering=0) as filling:
        os.set_blocking(writer, False)
        while filling.write(bytes(4096)):
            pass
        monkeypatch.setattr(select, "select", lambda *_files: reading.read(1 << 20))
        output = _Output(writer, "w", closefd=False)
        assert output.write(b"text") == 4
        assert reading.read(1 << 20) == b"text"


def test_help_names_every_command_and_every_exit_status() -> None:
    text = output_of(PBSFS, "--help")
    for name, summary in _COMMANDS.items():
        assert f"  {name} " in text
        assert summary in text
    assert "Examples:" in text
    for status in ("0  done", "2  wrong usage", "3  no such", "4  the source", "5  encrypted", "6  damaged"):
        assert status in text
    assert "7  can't mount" in text
    assert "8  can't write" in text


@pytest.mark.parametrize(
    "words",
    ["", *_COMMANDS, "key show", "key recover", "config init", "config show", "config check"],
)
def test_help_fits_a_terminal_of_80_columns(words: str) -> None:
    lines = output_of(PBSFS, *words.split(), "--help").splitlines()
    assert max(map(len, lines)) <= 80
    # A manual page indents the examples by three more.
    assert all(len(line) <= 77 for line in lines if re.match(r" {4,}pbsfs ", line))
    assert not [line for line in lines[1:] if line.endswith("...")]  # a summary that click shortened
    assert not re.search("x[<>]=?[0-9]", "\n".join(lines))  # nobody but programmers writes ranges so


def test_every_error_has_its_status_in_the_help() -> None:
    def below(kind: type[PbsfsError]) -> set[type[PbsfsError]]:
        return {kind}.union(*(below(child) for child in kind.__subclasses__()))

    mine = {kind for kind in below(PbsfsError) if kind.__module__ == PbsfsError.__module__}
    statuses = {kind.exit_status for kind in mine}
    assert {0, *statuses} == {
        int(s) for s in re.findall(r"^ +(\d+) +[a-z]", output_of(PBSFS, "--help"), re.MULTILINE)
    }


@pytest.mark.parametrize("name", _COMMANDS)
def test_help_of_a_command_has_an_example(name: str) -> None:
    text = output_of(PBSFS, name, "--help")
    example = text.partition("Example")[2].splitlines()
    assert any(line.strip().startswith(f"pbsfs {name} ") for line in example) or name == "demo"
    assert any(line.strip().startswith(f"pbsfs {name}") for line in example)


@pytest.mark.parametrize("module", ["pbsfs.cli", "pbsfs.cli.mount", "pbsfs.cli.umount"])
def test_who_only_starts_something_imports_nothing_heavy(module: str) -> None:
    heavy = {"trio", "h2", "h11", "http.client", "cryptography", "rich", "pyfuse3", "zstandard"}
    code = f"import sys, {module}; print(*sorted({heavy} & set(sys.modules)))"
    assert output_of(sys.executable, "-c", code) == "\n"


@pytest.mark.parametrize(
    "words", [["--version"], ["ls", "--help"], ["ls", "--datastore-dir", "/nonexistent"], ["boot"]]
)
def test_the_collector_looks_for_garbage_again_when_everything_is_imported(words: list[str]) -> None:
    code = f"""
import atexit, gc, sys
from pbsfs.__main__ import main
atexit.register(lambda: print(gc.isenabled()))
sys.argv = ["pbsfs", *{words}]
main()
"""
    done = run([sys.executable, "-c", code])
    assert done.stdout.splitlines()[-1] == "True", done.stderr


def test_the_collector_looks_for_garbage_again_after_a_command_that_cannot_be_imported() -> None:
    code = """
import gc, importlib
from pbsfs.cli import cli

def import_module(name):
    assert not gc.isenabled()
    raise MemoryError

importlib.import_module = import_module
try:
    cli.main(["ls"], standalone_mode=False)
except MemoryError:
    print(gc.isenabled())
"""
    assert output_of(sys.executable, "-c", code) == "True\n"


def test_a_directory_is_read_without_what_only_settings_or_a_server_need(tmp_path: Path) -> None:
    stock(tmp_path / "store")
    others = {"tomllib", "h2", "h11", "http.client", "cryptography", "rich", "pyfuse3"}
    code = f"""
import atexit, sys
from pbsfs.__main__ import main
atexit.register(lambda: print(*sorted({others} & set(sys.modules)), file=sys.stderr))
sys.argv = ["pbsfs", "ls", "--datastore-dir", {str(tmp_path / "store")!r}]
main()
"""
    done = run([sys.executable, "-c", code])
    assert (done.returncode, done.stderr) == (0, "\n")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("ls --connections 17", "17 is not a whole number from 1 to 16."),
        ("ls --connections 1.5", "1.5 is not a whole number from 1 to 16."),
        ("ls --port 0", "0 is not a whole number from 1 to 65535."),
        ("ls --retry-timeout=-1", "-1 is not a number of seconds; give one from 0 on."),
        ("ls --retry-timeout inf", "inf is not a number of seconds"),
        ("ls --retry-timeout soon", "soon is not a number of seconds"),
    ],
)
def test_numbers_that_are_out_of_range_are_refused(words: str, reason: str) -> None:
    assert reason in error_of(pbsfs(*words.split()), 2)


def test_the_help_tells_how_long_a_server_is_waited_for() -> None:
    assert f"(default: {DEFAULT_LIMIT:.0f})" in " ".join(output_of(PBSFS, "mount", "--help").split())


@pytest.mark.parametrize(
    "arguments", [[], ["nonsense"], ["ls", "--nonsense"], ["export", "one"], ["mount"], ["completion", "csh"]]
)
def test_wrong_usage_is_status_2(arguments: list[str]) -> None:
    done = pbsfs(*arguments)
    assert done.returncode == 2
    assert "Usage: pbsfs" in done.stderr + done.stdout or "pbsfs --help lists the commands" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", READING, ids=lambda words: words[0])
def test_a_server_needs_a_password_and_never_waits_for_one(command: list[str], tmp_path: Path) -> None:
    repository = "root@pam@backup.example:store1"
    for arguments, changes in (
        ([*command, "--repository", repository, "--fingerprint", "00" * 32], {}),
        (command, {"PBS_REPOSITORY": repository, "PBS_FINGERPRINT": "00" * 32}),
    ):
        done = pbsfs(*arguments, env=environment(**changes), cwd=tmp_path)
        assert error_of(done, 2).startswith("no password for root@pam at backup.example:8007: set ")


@pytest.mark.parametrize("command", READING, ids=lambda words: words[0])
def test_no_command_leaves_its_memory_in_a_core_dump(command: list[str], tmp_path: Path) -> None:
    told = environment(PBS_REPOSITORY="root@pam@localhost:1:s", PBS_FINGERPRINT="00" * 32)
    told["PBS_PASSWORD_CMD"] = "sh -c 'ulimit -H -c >&2; exit 1'"  # inherits the limit
    done = pbsfs(*command, env=told, cwd=tmp_path)
    said = "pbsfs: PBS_PASSWORD_CMD: the command ended with status 1; run it in a shell to see why"
    assert done.stderr.splitlines() == ["0", said]


@pytest.mark.parametrize("command", READING, ids=lambda words: words[0])
def test_a_source_has_to_be_named_and_only_once(command: list[str], tmp_path: Path) -> None:
    assert error_of(pbsfs(*command, cwd=tmp_path), 2).startswith("no source: ")
    both = ["--repository", "x", "--datastore-dir", "/nowhere"]
    assert "exclude each other" in error_of(pbsfs(*command, *both, cwd=tmp_path), 2)


def test_a_setting_from_an_endless_file_is_refused_in_a_short_line() -> None:
    assert len(error_of(pbsfs("ls", env=environment(PBS_REPOSITORY_FILE="/dev/zero")), 2)) < 200
    told = environment(PBS_REPOSITORY="host:store", PBS_FINGERPRINT_FILE="/dev/zero", PBS_PASSWORD="x")
    assert len(error_of(pbsfs("ls", env=told), 2)) < 250


def test_a_directory_goes_before_the_environment(tmp_path: Path) -> None:
    own = stock(tmp_path / "datastore")
    done = pbsfs("ls", "--datastore-dir", own.path, env=environment(PBS_REPOSITORY="host:store"))
    assert done.stdout.split() == ["vm", "ct", "ns", "files"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_accepted_by_their_shell(shell: str, tmp_path: Path) -> None:
    (script := tmp_path / "script").write_text(output_of(PBSFS, "completion", shell))
    assert "_PBSFS_COMPLETE" in script.read_text()
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    option = "--no-execute" if shell == "fish" else "-n"
    done = run([shell, option, script])
    assert (done.returncode, done.stderr) == (0, "")


def test_completion_offers_commands_and_options() -> None:
    def offered(words: str, number: int) -> str:
        changes = {"_PBSFS_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(number)}
        return output_of(PBSFS, env=environment(**changes))

    assert "plain,umount" in offered("pbsfs um", 1)
    assert "plain,--datastore-dir" in offered("pbsfs ls --data", 2)


def test_a_log_of_debug_level_goes_where_it_is_sent(tmp_path: Path) -> None:
    own = stock(tmp_path / "datastore")
    (own.path / "vm/100/2023-11-15T22:13:20Z/index.json.blob").unlink()
    done = pbsfs("ls", "--datastore-dir", own.path, "vm/100")
    assert "pbsfs: WARNING: vm/100/2023-11-15T22:13:20Z: left out" in done.stderr
    log = tmp_path / "log"
    done = pbsfs("ls", "--datastore-dir", own.path, "--log-file", log, "vm/100")
    assert done.stderr == ""
    assert "WARNING vm/100/2023-11-15T22:13:20Z: left out" in log.read_text()
    done = pbsfs("ls", "--datastore-dir", own.path, "--log-level", "ERROR", "vm/100")
    assert done.stderr == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ("info", IMAGE),
        ("cat", CONFIGURATION),
        ("find", "files"),
        ("export", "--format", "tar", "files/ct/201/latest/root", "-"),
        ("export", "--format", "zip", "files/ct/201/latest/root", "-"),
        ("export", "--format", "tar", "--zstd", "files/ct/201/latest/root", "-"),
    ],
    ids=" ".join,
)
def test_output_that_cannot_be_written_is_a_failure_without_a_traceback(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    own = stock(tmp_path / "datastore")
    root = Node(children=[Node(b"a", stat.S_IFREG | 0o644, data=b"content")])
    archive = {"root.pxar.didx": write(root, split=False).main}
    DatastoreWriter(own.path).add_snapshot(made.snapshot("201", type="ct"), archive)
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [PBSFS, arguments[0], "--datastore-dir", own.path, *arguments[1:]],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
            env=environment(),
        )
    text = error_of(done, 8)
    assert (
        text == "cannot write standard output: No space left on device; name another place, or correct that"
    )


@pytest.mark.parametrize(
    "command", [("find", "files"), ("cat", IMAGE), ("export", "--format", "tar", "files", "-")]
)
def test_a_closed_standard_output_is_an_error_without_a_traceback(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    own = stock(tmp_path / "datastore")
    root = Node(children=[Node(b"a", stat.S_IFREG | 0o644)])
    archive = {"root.pxar.didx": write(root, split=False).main}
    DatastoreWriter(own.path).add_snapshot(made.snapshot("201", type="ct"), archive)
    arguments = ["files/ct/201/latest/root" if part == "files" else part for part in command]
    program = [PBSFS, arguments[0], "--datastore-dir", str(own.path), *arguments[1:]]
    done = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", *program],
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
        env=environment(),
    )
    assert error_of(done, 2) == "standard output is closed; redirect it to a file or program"
