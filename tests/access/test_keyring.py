"""The keys at hand: from files, directories and the usual places; what is named works, or says why not."""

from __future__ import annotations

import logging
import os
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from pbsfs.access import keyring
from pbsfs.access.keyring import KeyRing, read_keys
from pbsfs.access.options import SourceOptions
from pbsfs.access.resolve import open_keys
from pbsfs.access.terminal import Terminal
from pbsfs.base.errors import KeyFileError, PasswordError, UsageError
from pbsfs.base.secret import Secret
from pbsfs.formats.keyfile import KeyFile
from pbsfs.formats.keys import Key
from tests.support.keyfiles import HINT, PASSWORD, document, key_file
from tests.support.made import KEY, OTHER_KEY
from tests.support.waiting import wait_until

THIRD_KEY = Key(bytes(range(2, 34)))
OTHER_PASSWORD = "another one"


@pytest.fixture(autouse=True)
def config_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the vendor's client would have its key. Proxmox VE's place is not this machine's either."""
    places = tuple(tmp_path / place.relative_to("/") for place in keyring.KEY_DIRECTORIES)
    monkeypatch.setattr(keyring, "KEY_DIRECTORIES", places)
    return tmp_path / "config"


@pytest.fixture
def default_place(config_home: Path) -> Path:
    (path := config_home / "proxmox-backup" / "encryption-key.json").parent.mkdir(parents=True)
    return path


@pytest.fixture(params=[0, 1], ids=["Proxmox VE", "Proxmox Backup Server"])
def vendors_place(request: pytest.FixtureRequest) -> Path:
    place: Path = keyring.KEY_DIRECTORIES[request.param]
    place.mkdir(parents=True)
    return place


class Asked:
    """Somebody who is asked, and answers."""

    def __init__(self, *answers: str | None) -> None:
        self.answers = list(answers)
        self.questions: list[tuple[Path, str | None]] = []

    def __call__(self, path: Path, file: KeyFile) -> Secret | None:
        self.questions.append((path, file.hint))
        answer = self.answers.pop(0)
        return None if answer is None else Secret(answer)


def read(
    config_home: Path,
    *files: Path,
    given: bytes | None = None,
    password: str | None = None,
    ask: Asked | None = None,
    ask_for_default: bool = False,
) -> KeyRing:
    return read_keys(
        files,
        given=given,
        password=None if password is None else Secret(password),
        ask=ask or Asked(),
        ask_for_default=ask_for_default,
        config_home=config_home,
    )


def test_the_clients_own_key_is_asked_for_only_where_much_is_read(tmp_path: Path) -> None:
    (tmp_path / "proxmox-backup").mkdir()
    place = stored(tmp_path / "proxmox-backup" / "encryption-key.json", KEY, "scrypt")
    nobody = Asked()
    assert len(read(tmp_path, ask=nobody)) == 0
    assert nobody.questions == []

    somebody = Asked(PASSWORD)
    assert names(read(tmp_path, ask=somebody, ask_for_default=True)) == fingerprints(KEY)
    assert [path for path, _hint in somebody.questions] == [place]

    unasked = Asked()
    assert len(read(tmp_path, password=PASSWORD, ask=unasked, ask_for_default=True)) == 1
    assert unasked.questions == []


def test_who_is_asked_for_the_clients_own_key_may_go_on_without_it(tmp_path: Path) -> None:
    (tmp_path / "proxmox-backup").mkdir()
    stored(tmp_path / "proxmox-backup" / "encryption-key.json", KEY, "scrypt")
    for nothing in ("", None):
        assert len(read(tmp_path, ask=Asked(nothing), ask_for_default=True)) == 0
    with pytest.raises(PasswordError, match="wrong password"):
        read(tmp_path, ask=Asked("not it"), ask_for_default=True)


def stored(path: Path, key: Key = KEY, kind: str = "none", password: str = PASSWORD) -> Path:
    """A key file at `path`."""
    path.write_bytes(key_file(kind, key=key.reveal(), password=password, fingerprint=key.fingerprint))
    return path


def names(ring: KeyRing) -> set[str]:
    for fingerprint, key in ring.items():
        assert key.fingerprint == fingerprint
    return set(ring)


def fingerprints(*keys: Key) -> set[str]:
    return {key.fingerprint for key in keys}


# --- the ring


def test_a_ring_finds_keys_by_fingerprint_in_any_case() -> None:
    ring = KeyRing([KEY, OTHER_KEY])
    assert ring[KEY.fingerprint] is KEY
    assert ring.get(OTHER_KEY.fingerprint.upper()) is OTHER_KEY
    assert ring.get(THIRD_KEY.fingerprint) is None
    assert ring.get("") is None
    assert list(ring) == [KEY.fingerprint, OTHER_KEY.fingerprint]


def test_a_key_that_comes_twice_is_there_once() -> None:
    assert len(KeyRing([KEY, Key(KEY.reveal())])) == 1


def test_an_empty_ring_is_false() -> None:
    assert not KeyRing()
    assert KeyRing([KEY])


def test_what_is_dumped_loads_to_the_same() -> None:
    for keys in ([], [KEY], [KEY, OTHER_KEY, THIRD_KEY]):
        ring = KeyRing.load(KeyRing(keys).dump())
        assert list(ring) == [key.fingerprint for key in keys]
        assert [key.reveal() for key in ring.values()] == [key.reveal() for key in keys]


def test_a_ring_shows_nothing_of_its_keys() -> None:
    shown = f"{KeyRing([KEY])!r} {KeyRing([KEY])}"
    assert KEY.reveal().hex()[:8] not in shown


# --- files that are named


@pytest.mark.parametrize("kind", ["none", "scrypt", "pbkdf2"])
def test_a_named_file_is_read(config_home: Path, tmp_path: Path, kind: str) -> None:
    file = stored(tmp_path / "any name", kind=kind)
    assert names(read(config_home, file, password=PASSWORD)) == fingerprints(KEY)


def test_several_named_files_are_all_read(config_home: Path, tmp_path: Path) -> None:
    files = [
        stored(tmp_path / "a", KEY),
        stored(tmp_path / "b", OTHER_KEY, "scrypt"),
        stored(tmp_path / "c", THIRD_KEY, "pbkdf2"),
    ]
    ring = read(config_home, *files, password=PASSWORD)
    assert names(ring) == fingerprints(KEY, OTHER_KEY, THIRD_KEY)


def test_a_key_through_a_descriptor_is_one_more(config_home: Path, tmp_path: Path) -> None:
    given = key_file("scrypt", key=OTHER_KEY.reveal())
    assert names(read(config_home, given=given, password=PASSWORD)) == fingerprints(OTHER_KEY)
    ring = read(config_home, stored(tmp_path / "a"), given=given, password=PASSWORD)
    assert names(ring) == fingerprints(KEY, OTHER_KEY)


def test_a_named_pipe_is_read_to_its_end(config_home: Path, tmp_path: Path) -> None:
    os.mkfifo(path := tmp_path / "pipe")

    def write_in_two() -> None:
        with path.open("wb", buffering=0) as pipe:
            pipe.write(key_file()[:10])
            pipe.write(key_file()[10:])

    writer = threading.Thread(target=write_in_two)
    writer.start()
    ring = read(config_home, path)
    writer.join(timeout=20)
    assert names(ring) == fingerprints(KEY)


def links_of(directory: str) -> list[str]:
    found = []
    for entry in Path(directory).iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.append(os.readlink(entry))
    return found


def test_a_pipe_whose_writer_takes_its_time_is_waited_for(config_home: Path) -> None:
    # As a shell gives one: --keyfile <(pass show backup-key)
    reading, writing = os.pipe()
    path = Path(f"/proc/self/fd/{reading}")
    found: list[set[str]] = []
    reader = threading.Thread(target=lambda: found.append(names(read(config_home, path))))
    reader.start()
    pipe = os.readlink(path)
    wait_until(lambda: links_of("/proc/self/fd").count(pipe) == 3, "the reader has opened it too")
    os.write(writing, key_file())
    os.close(writing)
    reader.join(timeout=20)
    os.close(reading)
    assert found == [fingerprints(KEY)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "No such file or directory"),
        (b"", "not JSON"),
        (b"{}", "no 'kdf'"),
        (b" " * (65 << 10), "too long"),
        (key_file(data="AAAA"), "3 bytes"),
        (key_file(fingerprint=OTHER_KEY.fingerprint), f"not {OTHER_KEY.fingerprint}"),
    ],
)
def test_a_named_file_that_is_unusable_is_an_error(
    config_home: Path, tmp_path: Path, text: bytes | None, reason: str
) -> None:
    good, bad = stored(tmp_path / "good"), tmp_path / "bad.json"
    if text is not None:
        bad.write_bytes(text)
    with pytest.raises(KeyFileError) as caught:
        read(config_home, good, bad)
    assert str(caught.value).startswith(f"key file {bad}: ")
    assert reason in str(caught.value)


def test_a_descriptor_with_something_else_is_an_error(config_home: Path) -> None:
    with pytest.raises(KeyFileError, match=r"key file \(descriptor\): not a key file: not JSON"):
        read(config_home, given=b"", password=PASSWORD)


def test_a_name_that_no_file_can_have_is_an_error(config_home: Path, tmp_path: Path) -> None:
    (loop := tmp_path / "loop").symlink_to(loop)
    for path, reason in ((tmp_path / ("x" * 300), "File name too long"), (loop, "symbolic links")):
        with pytest.raises(KeyFileError, match=reason):
            read(config_home, path)


def test_where_files_are_named_nothing_else_is_read(
    config_home: Path, default_place: Path, vendors_place: Path, tmp_path: Path
) -> None:
    stored(default_place, OTHER_KEY)
    stored(vendors_place / "store.enc", THIRD_KEY)
    assert names(read(config_home, stored(tmp_path / "a"))) == fingerprints(KEY)
    assert names(read(config_home, given=key_file())) == fingerprints(KEY)


# --- passwords


def test_the_password_is_tried_for_each_that_needs_one(config_home: Path, tmp_path: Path) -> None:
    files = stored(tmp_path / "a", KEY, "scrypt"), stored(tmp_path / "b", OTHER_KEY, password=OTHER_PASSWORD)
    ask = Asked()
    assert len(read(config_home, *files, password=PASSWORD, ask=ask)) == 2
    other = stored(tmp_path / "c", OTHER_KEY, "pbkdf2", OTHER_PASSWORD)
    with pytest.raises(PasswordError) as caught:
        read(config_home, *files, other, password=PASSWORD, ask=ask)
    action = "correct PBS_ENCRYPTION_PASSWORD (or _FD, _FILE, _CMD), or key-password in the profile"
    assert str(caught.value) == f"key file {other}: wrong password (hint: {HINT}); {action}"
    assert ask.questions == []


def test_who_can_be_asked_is_asked_for_each_with_path_and_hint(config_home: Path, tmp_path: Path) -> None:
    files = [
        stored(tmp_path / "a", KEY, "scrypt"),
        stored(tmp_path / "b", THIRD_KEY),
        stored(tmp_path / "c", OTHER_KEY, "pbkdf2", OTHER_PASSWORD),
    ]
    ask = Asked(PASSWORD, OTHER_PASSWORD)
    assert names(read(config_home, *files, ask=ask)) == fingerprints(KEY, OTHER_KEY, THIRD_KEY)
    assert ask.questions == [(files[0], HINT), (files[2], HINT)]


def test_a_wrong_answer_is_an_error_with_the_hint(config_home: Path, tmp_path: Path) -> None:
    file = stored(tmp_path / "a", KEY, "scrypt")
    with pytest.raises(PasswordError) as caught:
        read(config_home, file, ask=Asked("wrong"))
    assert str(caught.value) == f"key file {file}: wrong password (hint: {HINT}); try again"
    assert "wrong\n" not in str(caught.value)


def test_an_answer_that_is_no_text_is_a_wrong_one(config_home: Path, tmp_path: Path) -> None:
    with pytest.raises(PasswordError, match="wrong password"):
        read(config_home, stored(tmp_path / "a", KEY, "scrypt"), ask=Asked("gar\udcffbled"))


def test_where_nobody_can_be_asked_it_says_how_to_give_the_password(
    config_home: Path, tmp_path: Path
) -> None:
    file = stored(tmp_path / "a", KEY, "pbkdf2")
    with pytest.raises(PasswordError) as caught:
        read(config_home, file, ask=Asked(None))
    assert str(caught.value).startswith(f"key file {file}: it needs a password")
    assert "PBS_ENCRYPTION_PASSWORD (or _FD, _FILE, _CMD)" in str(caught.value)


# --- directories that are named


def test_a_named_directory_gives_all_usable_keys_in_it(
    config_home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (place := tmp_path / "keys").mkdir()
    stored(place / "a.json", KEY)
    stored(place / "b.enc", OTHER_KEY, "scrypt")
    stored(place / "c.key", THIRD_KEY, "pbkdf2", OTHER_PASSWORD)
    stored(place / "d.bak", Key(bytes(32)))
    (place / "e.json").write_text("{}")
    (place / "f.json").mkdir()
    (place / "g.json").symlink_to(place / "none")
    os.mkfifo(place / "h.json")  # nobody will ever write to it
    with caplog.at_level(logging.DEBUG, "pbsfs"):
        ask = Asked()
        assert names(read(config_home, place, password=PASSWORD, ask=ask)) == fingerprints(KEY, OTHER_KEY)
    assert ask.questions == []
    told = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [level for level, _text in told] == ["INFO"] * 5
    for name, reason in (
        ("c.key", "wrong password"),
        ("e.json", "no 'kdf'"),
        ("f.json", "Is a directory"),
        ("g.json", "No such file"),
        ("h.json", "not a regular file"),
    ):
        (text,) = [text for _level, text in told if f"{place / name}: " in text]
        assert text.startswith("not used: key file ")
        assert reason in text
    caplog.clear()


def test_a_named_directory_without_a_usable_key_is_an_error(config_home: Path, tmp_path: Path) -> None:
    # With no key at all nothing would be verified, and nobody would notice.
    (place := tmp_path / "keys").mkdir()
    with pytest.raises(KeyFileError) as caught:
        read(config_home, stored(tmp_path / "good"), place)
    assert (
        str(caught.value)
        == f"key directory {place}: there is no key file in it; name one (*.json, *.enc, *.key)"
    )
    stored(place / "a.json", KEY, "scrypt")
    with pytest.raises(PasswordError, match=r"a\.json: it needs a password; set PBS_ENCRYPTION_PASSWORD"):
        read(config_home, place)
    (place / "a.json").write_text("?")
    with pytest.raises(KeyFileError, match=r"a\.json: not a key file"):
        read(config_home, place)


def test_a_named_directory_that_can_not_be_read_is_an_error(
    config_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> list[Path]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(KeyFileError, match=f"key directory {tmp_path}: Permission denied"):
        read(config_home, tmp_path)
    assert len(read(config_home)) == 0  # the usual places are not everybody's


def test_more_keys_than_can_be_passed_on_are_refused(
    config_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyring, "MAX_KEYS", 3)
    (place := tmp_path / "keys").mkdir()
    for number in range(3):
        stored(place / f"{number}.json", Key(number.to_bytes(32)))
    assert len(read(config_home, place)) == 3
    stored(place / "3.json", Key(bytes(range(32))))
    with pytest.raises(KeyFileError, match="3 is the most"):
        read(config_home, place)


# --- the usual places


def test_the_usual_places_are_the_clients_and_proxmox_ves(
    config_home: Path, default_place: Path, vendors_place: Path
) -> None:
    assert len(read(config_home)) == 0
    stored(default_place, KEY)
    assert names(read(config_home)) == fingerprints(KEY)
    stored(vendors_place / "store1.enc", OTHER_KEY)
    stored(vendors_place / "store2.enc", THIRD_KEY)
    stored(vendors_place / "store1.pw", Key(bytes(32)))
    assert names(read(config_home)) == fingerprints(KEY, OTHER_KEY, THIRD_KEY)


def test_the_usual_places_are_those_of_the_vendor() -> None:
    assert Path("/etc/pve/priv/storage") == KEYS_OF_PVE


KEYS_OF_PVE = keyring.KEY_DIRECTORIES[0]
"""Before any test has put another place there."""


@pytest.mark.parametrize("kind", ["scrypt", "pbkdf2"])
def test_a_protected_key_in_a_usual_place_takes_the_password_but_asks_nobody(
    config_home: Path, default_place: Path, vendors_place: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    stored(default_place, KEY, kind)
    stored(vendors_place / "store.enc", OTHER_KEY, kind, OTHER_PASSWORD)
    assert names(read(config_home, password=PASSWORD)) == fingerprints(KEY)
    ask = Asked()
    with caplog.at_level(logging.INFO, "pbsfs"):
        assert len(read(config_home, ask=ask)) == 0
    assert ask.questions == []
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert f"{default_place}: it needs a password" in told[0]
    assert f"{vendors_place / 'store.enc'}: it needs a password" in told[1]


def test_what_is_unusable_in_a_usual_place_is_told_and_left_out(
    config_home: Path, default_place: Path, vendors_place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    default_place.write_text("{}")
    (vendors_place / "bad.enc").write_bytes(key_file(fingerprint=OTHER_KEY.fingerprint))
    stored(vendors_place / "good.enc", THIRD_KEY)
    with caplog.at_level(logging.DEBUG, "pbsfs"):
        assert names(read(config_home)) == fingerprints(THIRD_KEY)
    assert [(record.levelname, record.getMessage().split(": ")[:2]) for record in caplog.records] == [
        ("INFO", ["not used", f"key file {default_place}"]),
        ("INFO", ["not used", f"key file {vendors_place / 'bad.enc'}"]),
    ]


def test_usual_places_that_do_not_exist_are_not_worth_a_word(
    config_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "pbsfs"):
        assert len(read(config_home)) == 0
    assert caplog.records == []


# --- from options and the environment


class FakeTerminal(Terminal):
    def __init__(self, answer: str) -> None:
        self.answer = answer
        self.questions: list[str] = []

    def password(self, text: str) -> Secret:
        self.questions.append(text)
        return Secret(self.answer)

    def confirm(self, text: str) -> bool:
        raise AssertionError(text)


def opened(
    tmp_path: Path,
    *keyfiles: Path,
    keyfd: int | None = None,
    terminal: Terminal | None = None,
    **environment: str,
) -> KeyRing:
    options = SourceOptions(keyfiles=keyfiles, keyfd=keyfd)
    return open_keys(options, {"HOME": str(tmp_path / "home"), **environment}, terminal)


def test_the_clients_place_follows_the_environment(tmp_path: Path) -> None:
    for directory, key in (("home/.config", KEY), ("xdg", OTHER_KEY)):
        (place := tmp_path / directory / "proxmox-backup").mkdir(parents=True)
        stored(place / "encryption-key.json", key)
    assert names(opened(tmp_path)) == fingerprints(KEY)
    assert names(opened(tmp_path, XDG_CONFIG_HOME=str(tmp_path / "xdg"))) == fingerprints(OTHER_KEY)
    assert names(opened(tmp_path, XDG_CONFIG_HOME="not/absolute")) == fingerprints(KEY)
    assert len(opened(tmp_path, XDG_CONFIG_HOME=str(tmp_path / "none"))) == 0


@pytest.mark.parametrize("form", ["", "_FD", "_FILE", "_CMD"])
def test_the_password_comes_from_where_the_client_has_it(tmp_path: Path, form: str) -> None:
    (place := tmp_path / "password").write_text(f"{PASSWORD}\nnot this\n")
    value = {"": PASSWORD, "_FILE": str(place), "_CMD": f"cat '{place}'"}.get(form)
    if value is None:
        value = str(os.open(place, os.O_RDONLY))  # closed by who reads it
    terminal = FakeTerminal("wrong")
    options = SourceOptions(keyfiles=(stored(tmp_path / "k", KEY, "scrypt"),))
    environment = {"HOME": str(tmp_path), f"PBS_ENCRYPTION_PASSWORD{form}": value}
    assert names(open_keys(options, environment, terminal)) == fingerprints(KEY)
    assert terminal.questions == []


def test_the_password_may_be_a_credential_of_systemd(tmp_path: Path) -> None:
    (tmp_path / "proxmox-backup-client.encryption-password").write_text(f"{PASSWORD}\n")
    file = stored(tmp_path / "k", KEY, "pbkdf2")
    assert len(opened(tmp_path, file, CREDENTIALS_DIRECTORY=str(tmp_path))) == 1


def test_the_question_at_a_terminal_has_path_and_hint(tmp_path: Path) -> None:
    terminal = FakeTerminal(PASSWORD)
    file = stored(tmp_path / "k", KEY, "scrypt")
    assert len(opened(tmp_path, file, terminal=terminal)) == 1
    (plain := tmp_path / "plain").write_bytes(key_file("pbkdf2", hint=None))
    assert len(opened(tmp_path, plain, terminal=terminal)) == 1
    assert terminal.questions == [
        f"password of the key {file} (hint: {HINT})",
        f"password of the key {plain}",
    ]


def test_a_key_comes_through_a_descriptor_which_is_closed(tmp_path: Path) -> None:
    fd = os.open(stored(tmp_path / "k"), os.O_RDONLY)
    assert names(opened(tmp_path, keyfd=fd)) == fingerprints(KEY)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize("fd", [-1, 999_999, 1 << 31, 1 << 70])
def test_a_descriptor_that_is_none_is_wrong_usage(tmp_path: Path, fd: int) -> None:
    with pytest.raises(UsageError, match=f"--keyfd {fd}: "):
        opened(tmp_path, keyfd=fd)


def test_no_error_shows_a_password_or_a_key(tmp_path: Path) -> None:
    texts = []
    (wrong := tmp_path / "wrong").write_bytes(key_file(fingerprint=OTHER_KEY.fingerprint))
    for path in (stored(tmp_path / "k", KEY, "scrypt"), wrong):
        with pytest.raises((PasswordError, KeyFileError)) as caught:
            opened(tmp_path, path, PBS_ENCRYPTION_PASSWORD="not-the-one")
        texts.append(f"{caught.value!r}")
    for text in texts:
        for secret in ("not-the-one", PASSWORD, document()["data"], KEY.reveal().hex()):
            assert secret not in text
