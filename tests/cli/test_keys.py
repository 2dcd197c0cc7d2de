"""Keys at the command line, by the real program: where they come from, how it ends; none is ever shown."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from pbsfs.formats import blob
from pbsfs.formats.index import FixedIndex
from pbsfs.formats.keys import Key
from pbsfs.formats.manifest import CryptMode
from pbsfs.fuse.mountpoint import mounted_at
from pbsfs.testing.writer import DatastoreWriter
from tests.support import damage, golden, made
from tests.support.golden import Original
from tests.support.keyfiles import HINT, key_file
from tests.support.made import KEY, OTHER_KEY
from tests.support.mounts import Mounted, cleaned_up, fails_with, mounted, opened, read_at
from tests.support.needs import need, need_fuse, need_root
from tests.support.program import PBSFS, environment, error_of, output_of, pbsfs
from tests.support.serving import PASSWORD as SERVER_PASSWORD
from tests.support.serving import access, serving
from tests.support.terminal import at_a_terminal

CHUNK = 1 << 16
THIRD_KEY = Key(bytes(range(2, 34)))

PASSWORD = f"geh€im: staple {os.getpid()}"
"""Nothing else on this machine has it."""

SECRETS = [PASSWORD.encode(), PASSWORD.partition(" ")[2].encode()]
"""The password, and the part of it that no encoding changes."""

PLAIN, ENCRYPTED, SIGNED, PROTECTED = (f"vm/{n}/2023-11-14T22:13:20Z/disk.img" for n in (100, 101, 102, 103))
EACH = {PLAIN: None, ENCRYPTED: KEY, SIGNED: OTHER_KEY, PROTECTED: THIRD_KEY}


@dataclass(frozen=True)
class Kept:
    """A datastore with backups of several keys, and where their files are. No test changes it."""

    path: Path
    writer: DatastoreWriter
    contents: dict[str, bytes]
    keys: Path

    def file(self, name: str) -> Path:
        return self.keys / name


def fill(path: Path) -> tuple[DatastoreWriter, dict[str, bytes]]:
    writer = DatastoreWriter(path)
    contents = {}
    modes = (CryptMode.NONE, CryptMode.ENCRYPT, CryptMode.SIGN_ONLY, CryptMode.ENCRYPT)
    for number, ((place, key), mode) in enumerate(zip(EACH.items(), modes, strict=True)):
        contents[place] = made.image(number, "rr0t", tail=512)
        writer.add_snapshot(
            made.snapshot(place.split("/")[1]),
            {"disk.img.fidx": contents[place], "fw.conf.blob": b"enable: 1\n" * 20},
            crypt_mode=mode,
            key=key,
            chunk_size=CHUNK,
            client_log=b"log\n",
        )
    return writer, contents


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    top = tmp_path_factory.mktemp("kept")
    writer, contents = fill(top / "datastore")
    (keys := top / "keys").mkdir()
    for name, kind, key in (
        ("plain.json", "none", KEY),
        ("scrypt.json", "scrypt", OTHER_KEY),
        ("pbkdf2.json", "pbkdf2", THIRD_KEY),
    ):
        text = key_file(kind, key=key.reveal(), password=PASSWORD, fingerprint=key.fingerprint)
        (keys / name).write_bytes(text)
    return Kept(writer.path, writer, contents, keys)


@pytest.fixture
def told(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Makes an environment in which no key lies in the client's place."""

    def make(**changes: str) -> dict[str, str]:
        return environment(**({"XDG_CONFIG_HOME": str(tmp_path / "config")} | changes))

    return make


Told = Callable[..., dict[str, str]]


def check_no_secrets(text: str | bytes) -> None:
    """Fails where there is a password or a key in `text`, in any form that it might have."""
    data = text.encode() if isinstance(text, str) else text
    forms = list(SECRETS)
    for key in (KEY, OTHER_KEY, THIRD_KEY):
        enc_key = key.reveal()
        id_key = hashlib.pbkdf2_hmac("sha256", enc_key, b"_id_key", 10, 32)
        for raw in (enc_key, id_key):
            forms += [raw[:12], raw.hex()[:16].encode(), b64encode(raw)[:16], repr(raw)[2:30].encode()]
    for form in forms:
        assert form not in data


def test_the_search_for_secrets_finds_them(kept: Kept) -> None:
    for text in (
        f"a{PASSWORD}b",
        kept.file("plain.json").read_text(),
        KEY.reveal().hex(),
        repr(KEY.reveal()),
    ):
        with pytest.raises(AssertionError):
            check_no_secrets(text)
    check_no_secrets(f"{KEY} {KEY.fingerprint}")


def reads(kept: Kept, copy: Path, place: str, *options: str | Path, **more: object) -> bool:
    """Whether `pbsfs export` gets a file as it was backed up, without a word."""
    done = pbsfs("export", "--datastore-dir", kept.path, *options, place, copy, **more)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    found = copy.read_bytes()
    copy.unlink()
    return found == kept.contents[place]


def refusal(kept: Kept, status: int, *arguments: str | Path, **more: object) -> str:
    """The line with which a command fails; there is no secret in it."""
    done = pbsfs(*arguments[:1], "--datastore-dir", kept.path, *arguments[1:], **more)
    check_no_secrets(done.stdout + done.stderr)
    return error_of(done, status)


# --- where keys come from


def test_each_backup_uses_its_own_of_several_keys(kept: Kept, told: Told, tmp_path: Path) -> None:
    files = [kept.file(name) for name in ("scrypt.json", "plain.json", "pbkdf2.json")]
    options = [f"--keyfile={file}" for file in files]
    for place in EACH:
        env = told(PBS_ENCRYPTION_PASSWORD=PASSWORD)
        assert reads(kept, tmp_path / "copy", place, *options, env=env)


def test_a_directory_of_keys_will_do(kept: Kept, told: Told, tmp_path: Path) -> None:
    env = told(PBS_ENCRYPTION_PASSWORD=PASSWORD)
    assert reads(kept, tmp_path / "copy", PROTECTED, "--keyfile", kept.keys, env=env)
    # Without the password those that need none remain.
    assert reads(kept, tmp_path / "copy", ENCRYPTED, "--keyfile", kept.keys, env=told())
    line = refusal(kept, 5, "export", "--keyfile", kept.keys, PROTECTED, tmp_path / "copy", env=told())
    assert THIRD_KEY.fingerprint in line


def test_a_key_comes_through_a_descriptor(kept: Kept, told: Told, tmp_path: Path) -> None:
    with kept.file("plain.json").open() as file:
        fd = file.fileno()
        assert reads(kept, tmp_path / "copy", ENCRYPTED, "--keyfd", str(fd), env=told(), pass_fds=[fd])
    with kept.file("plain.json").open() as file:
        assert reads(kept, tmp_path / "copy", ENCRYPTED, "--keyfd", "0", env=told(), stdin=file)


def test_a_key_comes_out_of_another_program(kept: Kept, told: Told, tmp_path: Path) -> None:
    need("bash")
    command = '"$1" export --datastore-dir "$2" --keyfile <(sleep 0; cat "$3") "$4" "$5"'
    arguments = [PBSFS, str(kept.path), str(kept.file("plain.json")), ENCRYPTED, str(tmp_path / "copy")]
    assert output_of("bash", "-c", command, "bash", *arguments, env=told()) == ""
    assert (tmp_path / "copy").read_bytes() == kept.contents[ENCRYPTED]


def test_the_clients_own_key_is_found(kept: Kept, told: Told, tmp_path: Path) -> None:
    (place := tmp_path / "config" / "proxmox-backup").mkdir(parents=True)
    (place / "encryption-key.json").write_bytes(kept.file("scrypt.json").read_bytes())
    env = told(PBS_ENCRYPTION_PASSWORD=PASSWORD)
    assert reads(kept, tmp_path / "copy", SIGNED, env=env)
    line = refusal(kept, 5, "export", ENCRYPTED, tmp_path / "copy", env=env)
    assert KEY.fingerprint in line
    assert OTHER_KEY.fingerprint in line
    # What nobody named is left out where its password is missing, and only the log tells.
    done = pbsfs("ls", "--log-level", "info", "--datastore-dir", kept.path, env=told())
    assert (done.returncode, done.stdout.split()) == (0, ["vm", "files"])
    assert f"not used: key file {place / 'encryption-key.json'}: it needs a password" in done.stderr


@pytest.mark.parametrize("form", ["", "_FD", "_FILE", "_CMD"])
def test_the_password_comes_from_a_variable_descriptor_file_or_command(
    kept: Kept, told: Told, tmp_path: Path, form: str
) -> None:
    (place := tmp_path / "password").write_text(f"{PASSWORD}\nnot this line\n")
    with place.open() as file:
        values = {"": PASSWORD, "_FD": str(file.fileno()), "_FILE": str(place), "_CMD": f"cat '{place}'"}
        env = told(**{f"PBS_ENCRYPTION_PASSWORD{form}": values[form]})
        key = kept.file("pbkdf2.json")
        fds = [file.fileno()]
        assert reads(kept, tmp_path / "copy", PROTECTED, "--keyfile", key, env=env, pass_fds=fds)


def test_keys_serve_a_server_as_they_do_a_directory(kept: Kept, tmp_path: Path) -> None:
    with serving(kept.path) as server:
        env = access(server, PBS_ENCRYPTION_PASSWORD=PASSWORD, XDG_CONFIG_HOME=str(tmp_path))
        done = pbsfs("export", "--keyfile", kept.keys, PROTECTED, tmp_path / "copy", env=env)
        assert (done.returncode, done.stderr) == (0, "")
        assert (tmp_path / "copy").read_bytes() == kept.contents[PROTECTED]
        lost = pbsfs("export", PROTECTED, tmp_path / "other", env=env)
        assert THIRD_KEY.fingerprint in error_of(lost, 5)


# --- how it ends


def test_a_missing_password_is_status_18_and_says_where_to_put_it(kept: Kept, told: Told) -> None:
    file = kept.file("scrypt.json")
    line = refusal(kept, 18, "ls", "--keyfile", file, env=told())
    assert line.startswith(f"key file {file}: it needs a password")
    assert "PBS_ENCRYPTION_PASSWORD" in line


@pytest.mark.parametrize("name", ["scrypt.json", "pbkdf2.json"])
def test_a_wrong_password_is_status_18_and_shows_the_hint(kept: Kept, told: Told, name: str) -> None:
    env = told(PBS_ENCRYPTION_PASSWORD="no-such-word")
    line = refusal(kept, 18, "ls", "--keyfile", kept.file(name), env=env)
    assert line.startswith(
        f"key file {kept.file(name)}: wrong password (hint: {HINT}); correct PBS_ENCRYPTION_PASSWORD"
    )


def test_a_key_file_that_is_none_is_status_19(kept: Kept, told: Told, tmp_path: Path) -> None:
    (empty := tmp_path / "empty").mkdir()
    (other := tmp_path / "other").write_text("-----BEGIN PRIVATE KEY-----\n")
    for path, reason in (
        (tmp_path / "none", "No such file or directory; name a file that you may read"),
        (other, "not a key file"),
        (empty, "there is no key file in it; name one (*"),
    ):
        line = refusal(kept, 19, "ls", "--keyfile", path, env=told())
        assert str(path) in line
        assert reason in line


@pytest.mark.parametrize("fd", ["-1", "987", "99999999999"])
def test_a_descriptor_that_is_none_is_status_2(kept: Kept, told: Told, fd: str) -> None:
    assert f"--keyfd {fd}: " in refusal(kept, 2, "ls", f"--keyfd={fd}", env=told())


def test_a_place_that_gives_no_password_is_status_2(kept: Kept, told: Told, tmp_path: Path) -> None:
    env = told(PBS_ENCRYPTION_PASSWORD_FILE=str(tmp_path / "none"))
    line = refusal(kept, 2, "ls", "--keyfile", kept.file("scrypt.json"), env=env)
    assert line.startswith("PBS_ENCRYPTION_PASSWORD_FILE: ")


def test_what_needs_a_key_that_is_not_given_is_status_5_and_told_by_its_name(
    kept: Kept, told: Told, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    choices: list[list[str]] = [[], ["--keyfile", str(kept.file("plain.json"))]]
    for options in choices:
        line = refusal(kept, 5, "export", *options, PROTECTED, copy, env=told())
        assert THIRD_KEY.fingerprint in line
        assert (KEY.fingerprint in line) == bool(options)
        facts = output_of(
            PBSFS, "info", "--datastore-dir", kept.path, "--json", *options, PROTECTED, env=told()
        )
        assert json.loads(facts)["size"] == str(len(kept.contents[PROTECTED]))
        assert json.loads(facts)["key_fingerprint"] == THIRD_KEY.fingerprint
    assert reads(kept, copy, SIGNED, env=told())  # nobody asked for it to be vouched for
    line = refusal(kept, 5, "export", "--keyfile", kept.file("plain.json"), SIGNED, copy, env=told())
    assert OTHER_KEY.fingerprint in line
    assert not copy.exists()


def test_a_signature_that_does_not_match_and_a_plain_chunk_are_status_6(told: Told, tmp_path: Path) -> None:
    writer, contents = fill(tmp_path / "datastore")
    (keys := tmp_path / "key").write_bytes(key_file())
    own = Kept(writer.path, writer, contents, tmp_path)
    directory = (writer.path / ENCRYPTED).parent
    digest = FixedIndex((directory / "disk.img.fidx").read_bytes()).digest(1)
    whole = writer.chunk_path(digest).read_bytes()
    damage.replace(writer.chunk_path(digest), blob.encode(contents[ENCRYPTED][CHUNK : 2 * CHUNK]))
    export = ("export", "--keyfile", keys, ENCRYPTED, tmp_path / "copy")
    line = refusal(own, 6, *export, env=told())
    assert "not encrypted" in line
    assert digest.hex() in line
    damage.replace(writer.chunk_path(digest), whole)
    assert reads(own, tmp_path / "copy", ENCRYPTED, "--keyfile", keys, env=told())
    manifest = json.loads(blob.decode((directory / "index.json.blob").read_bytes(), max_size=1 << 20))
    manifest["backup-time"] += 1
    damage.replace(directory / "index.json.blob", blob.encode(json.dumps(manifest).encode()))
    line = refusal(own, 6, *export, env=told())
    assert f"its signature does not match under the key {KEY.fingerprint}" in line
    assert sorted(path.name for path in tmp_path.iterdir() if "copy" in path.name) == []


# --- at a terminal


def test_a_password_is_asked_for_at_a_terminal_with_the_hint_and_not_shown(
    kept: Kept, told: Told, tmp_path: Path
) -> None:
    files = [kept.file("scrypt.json"), kept.file("pbkdf2.json")]
    command: list[str | Path] = [
        PBSFS,
        "export",
        "--datastore-dir",
        kept.path,
        *(f"--keyfile={file}" for file in files),
    ]
    questions = [(f"password of the key {file} (hint: {HINT})", PASSWORD) for file in files]
    status, shown = at_a_terminal([*command, PROTECTED, tmp_path / "copy"], questions, told())
    assert status == 0, shown
    check_no_secrets(shown)
    assert (tmp_path / "copy").read_bytes() == kept.contents[PROTECTED]


def test_a_wrong_answer_at_a_terminal_is_status_18(kept: Kept, told: Told) -> None:
    file = kept.file("scrypt.json")
    command: list[str | Path] = [PBSFS, "ls", "--datastore-dir", kept.path, "--keyfile", file]
    status, shown = at_a_terminal(command, [(f"password of the key {file}", "no-such-word")], told())
    assert status == 18
    assert shown.splitlines()[-1] == f"pbsfs: key file {file}: wrong password (hint: {HINT}); try again"
    assert "no-such-word" not in shown


def test_nobody_is_asked_where_the_password_is_given_or_no_key_needs_one(kept: Kept, told: Told) -> None:
    for name, changes in (("plain.json", {}), ("scrypt.json", {"PBS_ENCRYPTION_PASSWORD": PASSWORD})):
        command: list[str | Path] = [PBSFS, "ls", "--datastore-dir", kept.path, "--keyfile", kept.file(name)]
        status, shown = at_a_terminal(command, [], told(**changes))
        assert (status, shown.split()) == (0, ["vm", "files"])


def test_without_a_terminal_nobody_is_asked(kept: Kept, told: Told, tmp_path: Path) -> None:
    # Somebody who pipes in answers does not sit at a terminal.
    (answers := tmp_path / "answers").write_text(f"{PASSWORD}\n")
    with answers.open() as piped:
        refusal(kept, 18, "ls", "--keyfile", kept.file("scrypt.json"), env=told(), stdin=piped)


# --- mounts


@pytest.mark.mount
def test_a_mount_in_the_background_reports_what_is_wrong_with_a_key(
    kept: Kept, told: Told, tmp_path: Path
) -> None:
    need_fuse()
    (place := tmp_path / "m").mkdir()
    log = ("--log-file", tmp_path / "log")
    with cleaned_up(place):
        line = refusal(kept, 18, "mount", *log, "--keyfile", kept.file("scrypt.json"), place, env=told())
        assert "it needs a password" in line
        line = refusal(kept, 19, "mount", *log, "--keyfile", tmp_path / "none", place, env=told())
        assert "No such file" in line
        assert not mounted_at(place)


@pytest.mark.mount
def test_a_mount_in_the_background_asks_before_it_goes_there(kept: Kept, told: Told, tmp_path: Path) -> None:
    need_fuse()
    (place := tmp_path / "m").mkdir()
    log = tmp_path / "log"
    command: list[str | Path] = [PBSFS, "mount", "--datastore-dir", kept.path, "--log-file", log, "--keyfile"]
    with cleaned_up(place):
        question = (f"(hint: {HINT})", PASSWORD)
        status, shown = at_a_terminal([*command, kept.file("pbkdf2.json"), place], [question], told())
        assert status == 0, shown
        assert (place / PROTECTED).read_bytes() == kept.contents[PROTECTED]
        assert (tmp_path / "log").read_text() == ""
        assert pbsfs("umount", place).returncode == 0


def processes() -> Iterator[tuple[int, bytes]]:
    """What the command lines and environments of all processes show, as far as this user may look."""
    for directory in Path("/proc").glob("[0-9]*"):
        shown = b""
        for name in ("cmdline", "environ", "comm"):
            with suppress(OSError):  # ended meanwhile, or somebody else's
                shown += (directory / name).read_bytes() + b"\n"
        yield int(directory.name), shown


def pipes_from_others(process: int) -> list[str]:
    """Pipes that a process has one end of."""
    need_root("look into a process that keeps its memory to itself")
    names = [os.readlink(descriptor) for descriptor in Path(f"/proc/{process}/fd").iterdir()]
    return [name for name, ends in Counter(names).items() if name.startswith("pipe:") and ends == 1]


def check_keeps_secrets(mount: Mounted) -> None:
    """Looks for secrets wherever others could find them while `mount` is there."""
    own = dict(processes())
    assert os.fsencode(mount.place) in own[mount.pid]  # so this is where a secret would be
    for shown in own.values():
        check_no_secrets(shown)
    check_no_secrets(Path(f"/proc/{mount.pid}/mountinfo").read_bytes())
    check_no_secrets("\n".join(mount.log_lines()))
    if os.geteuid() == 0:  # others may not even look
        assert not pipes_from_others(mount.pid), "the one that the keys came through is closed"
        (limit,) = [
            line
            for line in Path(f"/proc/{mount.pid}/limits").read_text().splitlines()
            if line.startswith("Max core file size")
        ]
        assert limit.split()[4:6] == ["0", "0"]


@pytest.mark.mount
@pytest.mark.parametrize("form", ["", "_FILE", "_CMD"])
def test_a_mount_shows_no_key_and_no_password_to_anybody(
    kept: Kept, told: Told, tmp_path: Path, form: str
) -> None:
    (file := tmp_path / "password").write_text(f"{PASSWORD}\n")
    values = {"": PASSWORD, "_FILE": str(file), "_CMD": f"cat '{file}'"}
    env = told(**{f"PBS_ENCRYPTION_PASSWORD{form}": values[form]})
    options = ("--datastore-dir", str(kept.path), "--keyfile", str(kept.keys), "--log-level", "debug")
    with mounted(env, tmp_path / "m", *options) as mount:
        for path, content in kept.contents.items():
            assert (mount / path).read_bytes() == content
        check_keeps_secrets(mount)
        assert os.fsencode(file) not in dict(processes())[mount.pid]


@pytest.mark.mount
def test_a_mount_of_a_server_shows_neither_its_secrets_nor_those_of_keys(kept: Kept, tmp_path: Path) -> None:
    with serving(kept.path) as server:
        env = access(server, PBS_ENCRYPTION_PASSWORD=PASSWORD, XDG_CONFIG_HOME=str(tmp_path))
        with mounted(env, tmp_path / "m", "--keyfile", str(kept.keys), "--log-level", "debug") as mount:
            for path, content in kept.contents.items():
                assert (mount / path).read_bytes() == content
            check_keeps_secrets(mount)
            log = "\n".join(mount.log_lines())
            assert "DEBUG" in log
            assert SERVER_PASSWORD not in log


@pytest.mark.mount
def test_what_a_mount_logs_of_attacks_holds_no_secrets(told: Told, tmp_path: Path) -> None:
    writer, contents = fill(tmp_path / "datastore")
    (keys := tmp_path / "key").write_bytes(key_file())
    directory = (writer.path / ENCRYPTED).parent
    digest = FixedIndex((directory / "disk.img.fidx").read_bytes()).digest(0)
    damage.replace(writer.chunk_path(digest), blob.encode(contents[ENCRYPTED][:CHUNK]))
    options = ("--datastore-dir", str(writer.path), "--keyfile", str(keys), "--log-level", "debug")
    with mounted(told(), tmp_path / "m", *options) as mount:
        assert read_at(mount / ENCRYPTED, CHUNK, CHUNK) == contents[ENCRYPTED][CHUNK : 2 * CHUNK]
        assert fails_with(errno.EIO, lambda: read_at(mount / ENCRYPTED, 0, CHUNK))
        for path in (PROTECTED, SIGNED):
            assert fails_with(errno.EACCES, lambda path=path: (mount / path).open("rb"))  # type: ignore[misc]
            assert (mount / path).stat().st_size == len(contents[path])
        shown = os.getxattr(mount / PROTECTED, "user.pbs.key_fingerprint")
        assert shown.decode() == THIRD_KEY.fingerprint
        log = "\n".join(mount.log_lines())
        assert "not encrypted" in log
        assert THIRD_KEY.fingerprint in log
        assert contents[ENCRYPTED][:16].hex() not in log
        check_keeps_secrets(mount)


def test_a_log_of_debug_level_holds_no_secrets(kept: Kept, told: Told, tmp_path: Path) -> None:
    env = told(PBS_ENCRYPTION_PASSWORD=PASSWORD)
    for place, status in ((PROTECTED, 0), ("vm/104", 3)):
        done = pbsfs(
            *("export", "--log-level", "debug", "--datastore-dir", kept.path, "--keyfile", kept.keys),
            *(place, tmp_path / "copy"),
            env=env,
        )
        assert done.returncode == status
        check_no_secrets(done.stdout + done.stderr)


# --- the vendor's own data

GOLDEN_PASSWORD = "correct-horse"
MIB = 1 << 20


@pytest.fixture(scope="module")
def golden_mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    """A mount in the background, with all keys of the golden data."""
    top = tmp_path_factory.mktemp("golden")
    env = environment(PBS_ENCRYPTION_PASSWORD=GOLDEN_PASSWORD, XDG_CONFIG_HOME=str(top))
    keys = [f"--keyfile={golden.ROOT / 'keys' / name}.json" for name in ("plain", "scrypt", "pbkdf2")]
    with mounted(env, top / "m", "--datastore-dir", str(golden.DATASTORE), *keys) as found:
        yield found


def runs_of(path: Path) -> tuple[tuple[int, bytes | None], ...]:
    """The runs of a file: lengths of holes, as the kernel tells them, and bytes."""
    runs: list[tuple[int, bytes | None]] = []
    with opened(path) as fd:
        size, offset = os.fstat(fd).st_size, 0
        while offset < size:
            try:
                data = os.lseek(fd, offset, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:  # there is no data any more
                    raise
                data = size
            if data > offset:
                runs.append((data - offset, None))
            offset = data
            end = os.lseek(fd, offset, os.SEEK_HOLE) if offset < size else size
            while offset < end:
                piece = os.pread(fd, min(MIB, end - offset), offset)
                runs.append((len(piece), piece))
                offset += len(piece)
    return tuple(runs)


@functools.cache
def sum_of(runs: tuple[tuple[int, bytes | None], ...]) -> str:
    """SHA-256 of runs; the same ones are summed once."""
    state, zeros = hashlib.sha256(), bytes(MIB)
    for length, data in runs:
        for start in range(0, length, MIB):
            state.update(zeros[: length - start] if data is None else data)
    return state.hexdigest()


@pytest.mark.golden
@pytest.mark.mount
@pytest.mark.parametrize("original", golden.originals(), ids=lambda original: original.path)
def test_with_its_keys_a_mount_shows_all_of_the_golden_data(
    golden_mount: Mounted, original: Original
) -> None:
    path = golden_mount / original.path
    runs = runs_of(path)
    assert path.stat().st_size == original.size
    if original.size > 100 * MIB:
        assert sum(length for length, data in runs if data is not None) == 8 * MIB
    assert sum_of(runs) == original.sha256


@pytest.mark.golden
@pytest.mark.mount
def test_the_mount_of_the_golden_data_shows_no_secrets(golden_mount: Mounted) -> None:
    stored = json.loads((golden.ROOT / "keys" / "plain.json").read_text())["data"]
    key = golden.plain_key().reveal()
    shown = dict(processes())[golden_mount.pid] + Path(f"/proc/{golden_mount.pid}/mountinfo").read_bytes()
    for secret in (GOLDEN_PASSWORD.encode(), stored.encode()[:16], key[:12], key.hex().encode()[:16]):
        assert secret not in shown
    assert b"PBS_ENCRYPTION_PASSWORD" not in shown
