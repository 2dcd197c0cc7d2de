"""`pbsfs nbd`, by the real program and the real nbdkit: what it says, who can reach it, how it ends."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from pbsfs.nbd.launch import Address
from pbsfs.testing.demo import PARTITION_START
from pbsfs.testing.writer import DatastoreWriter
from tests.support import damage, keyfiles, made
from tests.support.foreground import Foreground, foreground
from tests.support.needs import need, need_root
from tests.support.program import environment, error_of, output_of, pbsfs, run
from tests.support.server import ReferenceServer
from tests.support.serving import PASSWORD, SECRET, TOKEN, USER, WAYS_IN, access, serving, without
from tests.support.stocked import (
    ARCHIVE,
    CHUNK,
    CONFIGURATION,
    ENCRYPTED,
    FIRST,
    IMAGE,
    IN_NAMESPACE,
    NEWER_IMAGE,
    Stocked,
)
from tests.support.strangers import closed_port
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def _programs() -> None:
    need("nbdkit", "nbdinfo", "nbdcopy")


@pytest.fixture(scope="module")
def server(stocked: Stocked) -> Iterator[ReferenceServer]:
    with serving(stocked.path) as found:
        yield found


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    (path := tmp_path / "key.json").write_bytes(keyfiles.key_file())
    return path


@contextmanager
def served(source: Path | dict[str, str], *arguments: str | Path) -> Iterator[tuple[Foreground, str]]:
    """`pbsfs nbd ARGUMENTS` and the URI that it prints; it is ended afterwards, in order and in silence.

    `source`: a datastore's directory, or the environment that tells which server has it.
    """
    if isinstance(source, Path):
        arguments, told = ("--datastore-dir", source, *arguments), environment()
    else:
        told = source
    with foreground("nbd", *arguments, env=told) as command:
        yield command, command.line()
        if command.process.poll() is None:
            assert command.stop() == 128 + signal.SIGTERM


def refused(stocked: Stocked, status: int, *arguments: str | Path) -> str:
    """The one line with which `pbsfs nbd` refuses."""
    return error_of(pbsfs("nbd", "--datastore-dir", stocked.path, *arguments), status)


def read(uri: str) -> bytes:
    """All of an export."""
    done = subprocess.run(["nbdcopy", uri, "-"], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout


def socket_of(uri: str) -> Path:
    return Path(parse_qs(urlsplit(uri).query)["socket"][0])


def files_of(folder: Path) -> dict[Path, str]:
    """All files below `folder`, by their content."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- one image


def test_the_uri_is_printed_as_soon_as_clients_can_come(stocked: Stocked) -> None:
    with served(stocked.path, IMAGE) as (command, uri):
        assert output_of("nbdinfo", "--size", uri).strip() == str(len(stocked.contents[IMAGE]))
        assert read(uri) == stocked.contents[IMAGE]
        assert "is_read_only: true" in output_of("nbdinfo", uri)
        assert command.output() == f"{uri}\n"
        assert command.errors() == []


def test_an_archive_is_served_where_it_is_named(stocked: Stocked) -> None:
    with served(stocked.path, ARCHIVE) as (command, uri):
        assert read(uri) == stocked.contents[ARCHIVE]
        (line,) = command.errors()
        assert f"{ARCHIVE} is an archive of files, not a disk" in line


def test_latest_is_what_it_was_when_it_started(own: Stocked) -> None:
    with served(own.path, "vm/100/latest/drive-scsi0.img") as (_, uri):
        newer = made.snapshot(time=made.TIME + 2 * made.DAY)
        own.writer.add_snapshot(newer, {"drive-scsi0.img.fidx": b"x" * 512}, chunk_size=CHUNK)
        assert read(uri) == own.contents[NEWER_IMAGE]


def test_a_namespace_is_where_paths_start(stocked: Stocked) -> None:
    inside = IN_NAMESPACE.removeprefix("ns/prod/")
    with served(stocked.path, "--ns", "prod", inside) as (_, uri):
        assert read(uri) == stocked.contents[IN_NAMESPACE]


def test_nothing_is_written_to_the_datastore(stocked: Stocked, tmp_path: Path) -> None:
    before = files_of(stocked.path)
    (other := tmp_path / "other").write_bytes(made.image(9, "rrrrrrrr", tail=1536))
    with served(stocked.path, "--cow", IMAGE) as (_, uri):
        # From a file: nbdcopy 1.14 at times waits for ever where it copies from NBD to NBD.
        output_of("nbdcopy", other, uri)
        assert read(uri) == other.read_bytes()
    assert files_of(stocked.path) == before


# --- where it listens, and how it ends


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_default_socket_is_private_and_gone_with_it(stocked: Stocked, number: signal.Signals) -> None:
    with served(stocked.path, IMAGE) as (command, uri):
        folder = socket_of(uri).parent
        assert folder.parent == command.temporary
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert command.programs("nbdkit")
        assert command.stop(number) == 128 + number
        assert "".join(command.errors()) == ""


def test_ctrl_c_ends_it_and_nbdkit(stocked: Stocked) -> None:
    with served(stocked.path, IMAGE) as (command, _):
        command.interrupt()
        assert command.ended() == 130
        assert "".join(command.errors()) == ""


def test_the_end_of_nbdkit_is_a_failure(stocked: Stocked) -> None:
    with served(stocked.path, IMAGE) as (command, _):
        (nbdkit,) = command.programs("nbdkit")
        os.kill(nbdkit, signal.SIGKILL)
        assert command.ended() == 9
        assert command.errors() == ["pbsfs: nbdkit was ended by signal 9; start it again"]


def test_no_nbdkit_outlives_it_even_when_it_is_killed(stocked: Stocked) -> None:
    with served(stocked.path, IMAGE) as (command, _):
        command.process.kill()
        command.process.wait()
        wait_until(command.no_process_is_left, "nbdkit ends with what started it")


def test_a_socket_can_be_named(stocked: Stocked, tmp_path: Path) -> None:
    with foreground(
        *("nbd", "--datastore-dir", stocked.path, "--socket", "a socket", IMAGE), cwd=tmp_path
    ) as command:
        uri = command.line()
        assert socket_of(uri) == tmp_path / "a socket"
        assert (tmp_path / "a socket").is_socket()
        assert read(uri) == stocked.contents[IMAGE]
        assert command.stop() == 143
    assert list(tmp_path.iterdir()) == []


def test_a_socket_that_is_there_is_not_taken_over(stocked: Stocked, tmp_path: Path) -> None:
    (path := tmp_path / "socket").write_text("precious")
    assert f"--socket {path}: a file exists there; name another path" in refused(
        stocked, 2, "--socket", path, IMAGE
    )
    assert path.read_text() == "precious"
    left = tmp_path / "left"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(left))
    assert f"--socket {left}: exists; remove it" in refused(stocked, 2, "--socket", left, IMAGE)
    assert left.is_socket()


def test_a_second_path_is_refused(stocked: Stocked) -> None:
    assert "a second PATH; give one" in refused(stocked, 2, IMAGE, NEWER_IMAGE)
    assert "quote the command of --run" in refused(stocked, 2, IMAGE, "--run", "nbdinfo", "more")


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_it_listens_with_tcp_where_it_is_told_to(stocked: Stocked, host: str) -> None:
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    try:
        with socket.create_server((host.strip("[]"), 0), family=family) as free:
            port = free.getsockname()[1]
    except OSError as error:
        pytest.skip(f"no loopback at {host}: {error}")
    with served(stocked.path, "--listen", f"{host}:{port}", IMAGE) as (command, uri):
        assert uri == f"nbd://{host}:{port}/"
        assert read(uri) == stocked.contents[IMAGE]
        assert list(command.temporary.iterdir()) == []


def test_a_port_that_is_in_use_is_told_by_nbdkit_and_by_us(stocked: Stocked) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with foreground("nbd", "--datastore-dir", stocked.path, "--listen", f":{port}", IMAGE) as command:
            assert command.ended() == 9
            assert command.output() == ""
            *theirs, ours = command.errors()
    assert any("Address already in use" in line for line in theirs)
    assert ours.startswith("pbsfs: nbdkit ended with status 1 before it served; correct what its own message")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--listen", ":x", IMAGE], "'x' is not a port"),
        (["--listen", ":1", "--socket", "s", IMAGE], "--socket and --listen exclude each other"),
        (["--socket", "", IMAGE], "the path is empty"),
        ([], "name the image to serve"),
        (["-v", IMAGE], "name the image to serve"),
        (["--all", IMAGE], "--all and the path"),
        (["--cache-size", "1M", IMAGE], "least is 32M"),
        (["--ns", "a//b", IMAGE], "name of a namespace"),
        (["--repository", "a@pbs@b:c", IMAGE], "--repository and --datastore-dir exclude each other"),
    ],
)
def test_wrong_usage_is_status_2(stocked: Stocked, arguments: list[str], reason: str, tmp_path: Path) -> None:
    done = pbsfs("nbd", "--datastore-dir", stocked.path, *arguments, cwd=tmp_path)
    assert reason in error_of(done, 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "word", ["-U", "--unix=/tmp/s", "-p1", "-i", "--ipaddr=::", "--ip-addr", "-s", "--vsock"]
)
def test_nbdkits_own_ways_to_listen_are_refused_for_ours(stocked: Stocked, word: str) -> None:
    text = refused(stocked, 2, IMAGE, word, "1")
    assert text == f"{word}: not supported here; use --socket PATH or --listen HOST:PORT"


def test_a_port_is_the_servers_elsewhere_and_refused_here(stocked: Stocked) -> None:
    text = refused(stocked, 2, IMAGE, "--port", "1")
    assert text.startswith("--port: ambiguous; use --listen HOST:PORT for nbdkit, and give the server's port")


# --- many images


def exports(uri: str) -> set[str]:
    """Their names: of those that nbdinfo can open."""
    lines = output_of("nbdinfo", "--list", uri).splitlines()
    return {line.partition("=")[2].strip('":') for line in lines if line.startswith("export=")}


def named(command: Foreground, name: str) -> str:
    """The URI of an export."""
    return Address(socket=socket_of(command.line())).uri(name)


def test_all_images_are_exports_by_their_paths(stocked: Stocked) -> None:
    with served(stocked.path, "--all") as (command, uri):
        names = exports(uri)
        assert {IMAGE, NEWER_IMAGE, IN_NAMESPACE} <= names
        for path in (IMAGE, NEWER_IMAGE, IN_NAMESPACE):
            assert read(named(command, path)) == stocked.contents[path]
        hint = command.errors()[0]
        assert hint.startswith(f"Each image is an export, {named(command, 'NAME')};")
        assert "nbdinfo --list" in hint


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (FIRST, "drive-scsi0.img"),
        ("vm/100", IMAGE.removeprefix("vm/100/")),
        ("vm", IMAGE.removeprefix("vm/")),
    ],
)
def test_a_directorys_images_are_exports_by_their_paths_in_it(stocked: Stocked, path: str, name: str) -> None:
    with served(stocked.path, path) as (command, uri):
        assert name in exports(uri)
        assert read(named(command, name)) == stocked.contents[IMAGE]


# --- writing


def test_what_is_written_goes_to_a_layer_and_is_forgotten(stocked: Stocked, tmp_path: Path) -> None:
    (other := tmp_path / "other").write_bytes(made.image(9, "rrrrrrrr", tail=1536))
    assert other.stat().st_size == len(stocked.contents[IMAGE])
    with served(stocked.path, "--cow", IMAGE) as (_, uri):
        assert read(uri) == stocked.contents[IMAGE]
        output_of("nbdcopy", other, uri)
        assert read(uri) == other.read_bytes()
    with served(stocked.path, "--cow", IMAGE) as (_, uri):
        assert read(uri) == stocked.contents[IMAGE]


def test_without_that_nothing_can_be_written(stocked: Stocked, tmp_path: Path) -> None:
    (other := tmp_path / "other").write_bytes(made.image(9, "rrrrrrrr", tail=1536))
    with served(stocked.path, IMAGE) as (_, uri):
        assert run(["nbdcopy", other, uri]).returncode != 0
        assert read(uri) == stocked.contents[IMAGE]


@pytest.mark.parametrize("words", [["--cow", FIRST], ["--cow", "--all"], [FIRST, "--filter", "cow"]])
def test_one_layer_is_for_one_image(stocked: Stocked, words: list[str]) -> None:
    assert "filter cow does not support multiple exports" in refused(stocked, 2, *words)


# --- while a command runs


def run_with(stocked: Stocked, script: str, *options: str) -> subprocess.CompletedProcess[str]:
    return pbsfs("nbd", "--datastore-dir", stocked.path, IMAGE, "--run", script, *options)


def test_a_commands_output_and_status_are_its_own(stocked: Stocked) -> None:
    done = run_with(stocked, 'echo out; echo err >&2; nbdinfo --size "$uri"; exit 37')
    assert done.returncode == 37
    assert done.stdout == f"out\n{len(stocked.contents[IMAGE])}\n"
    assert done.stderr == "err\n"


def test_a_command_that_succeeds_is_success(stocked: Stocked, tmp_path: Path) -> None:
    need("qemu-img")
    copy = tmp_path / "copy"
    done = run_with(stocked, f"qemu-img convert -f raw -O raw \"$uri\" '{copy}'")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert copy.read_bytes() == stocked.contents[IMAGE]


def test_a_command_that_is_stopped_leaves_nothing(stocked: Stocked) -> None:
    script = "echo started; exec sleep 600"
    with served(stocked.path, IMAGE, "--run", script) as (command, line):
        assert line == "started"
        command.interrupt()
        assert command.ended() == 130


# --- what is passed on to nbdkit


def test_options_and_filters_with_their_parameters_reach_nbdkit(tmp_path: Path) -> None:
    need("sfdisk")
    (disk := tmp_path / "disk").write_bytes(made.image(5, "rr", chunk_size=PARTITION_START))
    subprocess.run(["sfdisk", "--quiet", disk], input=b"start=2048,type=83\n", check=True, timeout=60)
    DatastoreWriter(tmp_path / "datastore").add_snapshot(made.snapshot(), {"drive-scsi0.img.fidx": disk})
    words = [IMAGE, "-t", "4", "--filter=partition", "partition=1", "--filter=log", f"logfile={tmp_path}/log"]
    with served(tmp_path / "datastore", *words) as (command, uri):
        assert read(uri) == disk.read_bytes()[PARTITION_START:]
        (nbdkit,) = command.programs("nbdkit")
        given = Path(f"/proc/{nbdkit}/cmdline").read_text().split("\0")
        assert given[given.index("-t") + 1] == "4"
    assert "Read id=" in (tmp_path / "log").read_text()


def test_a_word_of_nbdkits_own_is_not_taken_apart(stocked: Stocked) -> None:
    with served(stocked.path, IMAGE, "-v", "-D", "python.x=0") as (command, uri):
        assert read(uri) == stocked.contents[IMAGE]
        assert any("nbdkit: debug: " in line for line in command.errors())


def test_what_nbdkit_does_not_take_is_told_by_nbdkit_and_by_us(stocked: Stocked) -> None:
    with foreground("nbd", "--datastore-dir", stocked.path, IMAGE, "--filter=no-such") as command:
        assert command.ended() == 9
        assert any("no-such" in line for line in command.errors())
        assert command.errors()[-1].startswith("pbsfs: nbdkit ended with status 1 before it served")


def test_a_parameter_that_is_none_is_told_by_the_plugin(stocked: Stocked) -> None:
    with foreground("nbd", "--datastore-dir", stocked.path, IMAGE, "partition=1") as command:
        assert command.ended() == 9
        assert any("parameter 'partition': unknown" in line for line in command.errors())


# --- what cannot be served


@pytest.mark.parametrize(
    ("path", "status", "reason"),
    [
        ("vm/999/latest/drive-scsi0.img", 3, "there is no '999'; there is 100, 101"),
        (f"{FIRST}/drive-scsi9.img", 3, "drive-scsi9.img"),
        (CONFIGURATION, 3, "is not an image"),
        (ENCRYPTED, 5, made.KEY.fingerprint[:8]),
    ],
)
def test_what_cannot_be_served_is_one_line(stocked: Stocked, path: str, status: int, reason: str) -> None:
    assert reason in refused(stocked, status, path)


def test_a_directory_that_is_no_datastore_is_status_4(tmp_path: Path) -> None:
    error_of(pbsfs("nbd", "--datastore-dir", tmp_path, IMAGE), 4)


def test_a_damaged_index_is_status_6(own: Stocked) -> None:
    damage.flip_bit(own.path / FIRST / "drive-scsi0.img.fidx", 4096 * 8 + 1)
    refused(own, 6, IMAGE)


def test_without_nbdkit_it_says_what_to_install(stocked: Stocked, tmp_path: Path) -> None:
    if any(Path(folder, "nbdkit").exists() for folder in ("/usr/sbin", "/sbin", "/usr/local/sbin")):
        pytest.skip("nbdkit lies where it is looked for without PATH")
    done = pbsfs("nbd", "--datastore-dir", stocked.path, IMAGE, env=environment(PATH=str(tmp_path)))
    assert error_of(done, 9) == "nbdkit is not installed; apt install nbdkit nbdkit-plugin-python"


def test_an_nbdkit_of_another_python_is_named(stocked: Stocked, tmp_path: Path) -> None:
    (fake := tmp_path / "nbdkit").write_text("#!/bin/sh\necho python_version=3.1.4\n")
    fake.chmod(0o755)
    told = environment(PATH=f"{tmp_path}:{os.environ['PATH']}")
    done = pbsfs("nbd", "--datastore-dir", stocked.path, IMAGE, env=told)
    assert "nbdkit's Python plugin has Python 3.1.4" in error_of(done, 9)


# --- keys, and damage


def test_an_encrypted_image_is_served_with_its_key(stocked: Stocked, key_file: Path, tmp_path: Path) -> None:
    with served(stocked.path, "--keyfile", key_file, ENCRYPTED) as (_, uri):
        assert read(uri) == made.image(4, "r0", tail=5)
    (locked := tmp_path / "locked.json").write_bytes(keyfiles.key_file("scrypt"))
    arguments = ("nbd", "--datastore-dir", stocked.path, "--keyfile", locked, ENCRYPTED)
    with foreground(*arguments, env=environment(PBS_ENCRYPTION_PASSWORD=keyfiles.PASSWORD)) as command:
        assert read(command.line()) == made.image(4, "r0", tail=5)
    error_of(pbsfs(*arguments, env=environment(PBS_ENCRYPTION_PASSWORD="wrong")), 18)
    key_file.write_text("{}")
    error_of(pbsfs("nbd", "--datastore-dir", stocked.path, "--keyfile", key_file, ENCRYPTED), 19)


def test_damage_is_an_error_or_zeros_that_are_told(own: Stocked) -> None:
    content = own.contents[IMAGE]
    damage.CHUNK_DAMAGE["bit flip"](own.writer.chunk_path(hashlib.sha256(content[:CHUNK]).digest()), b"")
    with served(own.path, IMAGE) as (command, uri):
        # One request at a time: nbdkit 1.32 dies when a client leaves in the middle of several.
        assert run(["nbdcopy", "--connections=1", "--requests=1", uri, "null:"]).returncode != 0
        assert any(f"{IMAGE}: bytes 0 to {CHUNK - 1}" in line for line in command.errors())
    with served(own.path, "--on-damage", "zero", IMAGE) as (command, uri):
        assert read(uri) == bytes(CHUNK) + content[CHUNK:]
        assert any(f"{IMAGE}: bytes 0 to {CHUNK - 1}" in line for line in command.errors())


# --- from a server


@pytest.mark.parametrize("who", WAYS_IN)
def test_it_serves_from_a_server(server: ReferenceServer, stocked: Stocked, who: str) -> None:
    with served(access(server, who), IMAGE) as (command, uri):
        assert read(uri) == stocked.contents[IMAGE]
        assert command.errors() == []
    wait_until(lambda: not server.open_sessions(), "no session outlives it")


def test_the_secret_comes_from_a_file_or_a_command(
    server: ReferenceServer, stocked: Stocked, tmp_path: Path
) -> None:
    told = without(access(server), "PBS_PASSWORD")
    (file := tmp_path / "secret").write_text(f"{PASSWORD}\n")
    for changes in ({"PBS_PASSWORD_FILE": str(file)}, {"PBS_PASSWORD_CMD": f"cat '{file}'"}):
        with served(told | changes, IMAGE) as (_, uri):
            assert read(uri) == stocked.contents[IMAGE]


def test_a_command_of_run_gets_no_secrets(stocked: Stocked) -> None:
    names = ("PBS_PASSWORD", "PBS_ENCRYPTION_PASSWORD", "PBS_MASTER_KEY_PASSWORD")
    told = environment(**{f"{name}{form}": "geheim" for name in names[1:] for form in ("_FILE", "_CMD")})
    told |= dict.fromkeys(names, "geheim")
    output = pbsfs("nbd", "--datastore-dir", stocked.path, IMAGE, "--run", "env", env=told).stdout
    assert "uri=nbd+unix:" in output
    assert "geheim" not in output


def test_no_secret_is_seen_in_any_process(server: ReferenceServer, key_file: Path) -> None:
    need_root("look into processes that keep their memory to themselves")
    told = access(server, TOKEN, PBS_ENCRYPTION_PASSWORD=keyfiles.PASSWORD)
    key_file.write_bytes(keyfiles.key_file("scrypt"))
    with served(told, "--keyfile", key_file, ENCRYPTED) as (command, uri):
        assert read(uri) == made.image(4, "r0", tail=5)
        (nbdkit,) = command.programs("nbdkit")
        seen = b"".join(Path(f"/proc/{nbdkit}/{name}").read_bytes() for name in ("cmdline", "environ"))
        ours = Path(f"/proc/{command.process.pid}/cmdline").read_bytes()
    assert b"PATH=" in seen
    for secret in (SECRET.encode(), keyfiles.PASSWORD.encode(), bytes(range(32))):
        assert secret not in seen + ours
    assert b"key.json" not in seen


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"PBS_PASSWORD": "wrong"}, 10),
        ({"PBS_PASSWORD_FILE": "/nowhere"}, 2),
        ({"PBS_FINGERPRINT": "00:" * 31 + "00"}, 12),
        ({"PBS_REPOSITORY": f"{USER}@host.invalid:store1"}, 13),
    ],
)
def test_a_failure_at_the_server_has_the_status_of_other_commands(
    server: ReferenceServer, changes: dict[str, str], status: int
) -> None:
    told = access(server)
    told = without(told, "PBS_PASSWORD") if "PBS_PASSWORD_FILE" in changes else told
    error_of(pbsfs("nbd", "--retry-timeout", "0", IMAGE, env=told | changes), status)


def test_a_datastore_that_is_not_there_is_status_16(server: ReferenceServer) -> None:
    told = access(server)
    other = told["PBS_REPOSITORY"].rpartition(":")[0] + ":other"
    error_of(pbsfs("nbd", IMAGE, env=told | {"PBS_REPOSITORY": other}), 16)


def test_a_server_that_is_not_there_is_status_14(server: ReferenceServer) -> None:
    with closed_port() as port:
        told = access(server, PBS_REPOSITORY=f"{USER}@127.0.0.1:{port}:store1")
        error_of(pbsfs("nbd", "--retry-timeout", "0", IMAGE, env=told), 14)


# --- the plugin as it is installed


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a non-editable installation is made of, built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pbsfs", "nbd_bridge.py", "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-index"]
    output_of(*pip, "--no-build-isolation", "--wheel-dir", folder / "out", folder)
    (path,) = (folder / "out").iterdir()
    return path


def test_an_installation_has_the_plugin_beside_pbsfs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert {"nbd_bridge.py", "pbsfs/__init__.py", "pbsfs/nbd/exports.py"} <= names
        assert archive.read("nbd_bridge.py") == (ROOT / "nbd_bridge.py").read_bytes()


def test_a_plugin_that_finds_no_pbsfs_says_so_in_one_line(tmp_path: Path) -> None:
    shutil.copy(ROOT / "nbd_bridge.py", tmp_path)
    done = run(
        ["nbdkit", "--foreground", "--unix=-", "python", tmp_path / "nbd_bridge.py", "--run", "true"],
        env=without(environment(), "VIRTUAL_ENV", "PYTHONPATH"),
        cwd=tmp_path,
    )
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "nbd_bridge.py: nbdkit has Python" in line]
    assert lines, done.stderr
    assert "Traceback" not in done.stderr
    assert "install pbsfs with python3" in lines[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_nothing_is_left_of_a_command_that_is_ended(stocked: Stocked, number: signal.Signals) -> None:
    with foreground(
        "nbd", "--datastore-dir", stocked.path, IMAGE, "--run", "echo on; exec sleep 60"
    ) as command:
        assert command.line() == "on"
        assert command.stop(number) == 128 + number
