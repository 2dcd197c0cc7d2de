"""`pbsfs key`: what key files say, and keys that come out of backups with a master key."""

from __future__ import annotations

import json
import stat
from base64 import b64encode
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15

from pbsfs.base.names import MASTER_KEY_BLOB
from pbsfs.testing.writer import DatastoreWriter
from tests.support import golden, made
from tests.support.keyfiles import KINDS, document, key_file
from tests.support.masterkeys import CONTENT, add_with_master_key, pem
from tests.support.program import PBSFS, environment, error_of, output_of, pbsfs
from tests.support.serving import access, serving
from tests.support.terminal import at_a_terminal

PASSWORD = "pass wörd: 1"
SNAPSHOT = "vm/106/2023-11-14T22:13:20Z"


# --- key show


def shown(path: Path) -> dict[str, str]:
    lines = output_of(PBSFS, "key", "show", path).splitlines()
    return {name: value.strip() for name, _colon, value in (line.partition(":") for line in lines)}


@pytest.mark.golden
@pytest.mark.parametrize(("name", "kdf"), [("plain", "none"), ("scrypt", "scrypt"), ("pbkdf2", "pbkdf2")])
def test_golden_keys_are_shown_without_their_password(name: str, kdf: str) -> None:
    path = golden.ROOT / "keys" / f"{name}.json"
    data = json.loads(path.read_text())
    members = ("created", "modified", "fingerprint", "hint")
    assert shown(path) == {"kdf": kdf} | {m: data[m] for m in members if m in data}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_key_file_has_is_shown(tmp_path: Path, kind: str) -> None:
    (path := tmp_path / "key.json").write_bytes(key_file(kind, fingerprint=made.KEY.fingerprint))
    data = document(kind)
    assert shown(path) == {
        "kdf": kind,
        "created": data["created"],
        "modified": data["modified"],
        "fingerprint": made.KEY.fingerprint,
        "hint": data["hint"],
    }


def test_what_a_key_file_does_not_have_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "key.json"
    for kind in KINDS:
        data = document(kind, hint=None)
        path.write_text(json.dumps({"kdf": data["kdf"], "data": data["data"]}))
        # Where no password is in the way, the fingerprint is that of the key itself.
        told = {"fingerprint": made.KEY.fingerprint} if kind == "none" else {}
        assert shown(path) == {"kdf": kind} | told


def test_nothing_secret_is_shown(tmp_path: Path) -> None:
    (path := tmp_path / "key.json").write_bytes(key_file())
    output = output_of(PBSFS, "key", "show", path)
    assert made.KEY.reveal().hex() not in output
    assert b64encode(made.KEY.reveal()).decode() not in output


def test_what_is_no_key_file_is_status_19(tmp_path: Path) -> None:
    path = tmp_path / "key.json"
    for content, words in (
        (b"", "not JSON"),
        (b"[]", "no 'kdf'"),
        (key_file(data="AAAA"), "'data' has 3 bytes"),
        (key_file(fingerprint=made.OTHER_KEY.fingerprint), made.KEY.fingerprint),
        (b" " * (65 << 10), "too long"),
    ):
        path.write_bytes(content)
        text = error_of(pbsfs("key", "show", path), 19)
        assert str(path) in text
        assert words in text
    assert "No such file" in error_of(pbsfs("key", "show", tmp_path / "none"), 19)
    assert "Is a directory" in error_of(pbsfs("key", "show", tmp_path), 19)


def test_a_hint_can_not_write_to_the_terminal(tmp_path: Path) -> None:
    (path := tmp_path / "key.json").write_bytes(key_file(hint="\x1b[2Jgone\nfingerprint: 00"))
    output = output_of(PBSFS, "key", "show", path)
    assert "\x1b" not in output
    assert len(output.splitlines()) == 5


# --- key recover, on made data


@pytest.fixture(scope="session")
def master() -> rsa.RSAPrivateKey:
    """A master key; making one takes a moment."""
    return rsa.generate_private_key(65537, 2048)


@pytest.fixture
def store(writer: DatastoreWriter, master: rsa.RSAPrivateKey) -> Path:
    """A datastore with a snapshot that has its key in it, and one that has none."""
    add_with_master_key(writer, master.public_key().encrypt(key_file(hint=None), PKCS1v15()))
    writer.add_snapshot(made.snapshot(), {"a.conf.blob": b"a"})
    return writer.path


@pytest.fixture
def private(tmp_path: Path, master: rsa.RSAPrivateKey) -> Path:
    """The file of the master key, without a password."""
    (path := tmp_path / "private.pem").write_bytes(pem(master))
    return path


@pytest.fixture
def protected(tmp_path: Path, master: rsa.RSAPrivateKey) -> Path:
    """The file of the master key, with a password."""
    (path := tmp_path / "protected.pem").write_bytes(pem(master, PASSWORD))
    return path


def recover_command(store: Path, pem_file: Path, out: Path, snapshot: str = SNAPSHOT) -> list[str | Path]:
    return ["key", "recover", "--datastore-dir", store, "--master-key", pem_file, snapshot, out]


def check_file(out: Path) -> None:
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert json.loads(out.read_bytes()) == document(hint=None)


def check_recovered(store: Path, out: Path) -> None:
    check_file(out)
    copy = out.with_name("copy.img")
    image = f"{SNAPSHOT}/drive-scsi0.img"
    assert pbsfs("export", "--datastore-dir", store, image, copy).returncode == 5
    assert output_of(PBSFS, "export", "--datastore-dir", store, "--keyfile", out, image, copy) == ""
    assert copy.read_bytes() == CONTENT


def test_the_key_that_comes_out_opens_the_image(store: Path, private: Path, tmp_path: Path) -> None:
    out = tmp_path / "key.json"
    printed = output_of(PBSFS, *recover_command(store, private, out, "vm/106/latest"))
    assert printed == f"{out}: the key {made.KEY.fingerprint}\n"
    check_recovered(store, out)


def test_through_a_server_it_comes_out_too(store: Path, private: Path, tmp_path: Path) -> None:
    out = tmp_path / "key.json"
    with serving(store) as server:
        command = ("key", "recover", "--master-key", private, SNAPSHOT, out)
        done = pbsfs(*command, env=access(server))
    assert (done.returncode, done.stderr) == (0, "")
    check_recovered(store, out)


def test_nobody_else_can_read_it_whatever_the_umask(store: Path, private: Path, tmp_path: Path) -> None:
    out = tmp_path / "key.json"
    done = pbsfs(*recover_command(store, private, out), umask=0)
    assert done.returncode == 0
    assert stat.S_IMODE(out.stat().st_mode) == 0o600


@pytest.mark.parametrize("variable", ["PBS_MASTER_KEY_PASSWORD", "PBS_ENCRYPTION_PASSWORD"])
@pytest.mark.parametrize("form", ["", "_FILE", "_CMD"])
def test_the_master_keys_password_is_where_passwords_are(
    store: Path, protected: Path, tmp_path: Path, variable: str, form: str
) -> None:
    (kept := tmp_path / "password").write_text(f"{PASSWORD}\n")
    value = {"": PASSWORD, "_FILE": str(kept), "_CMD": f"cat '{kept}'"}[form]
    out = tmp_path / "key.json"
    done = pbsfs(*recover_command(store, protected, out), env=environment(**{variable + form: value}))
    assert (done.returncode, done.stderr) == (0, "")
    check_file(out)


def test_its_own_password_comes_before_that_of_the_keys(store: Path, protected: Path, tmp_path: Path) -> None:
    out = tmp_path / "key.json"
    told = {"PBS_MASTER_KEY_PASSWORD": PASSWORD, "PBS_ENCRYPTION_PASSWORD": "wrong"}
    assert pbsfs(*recover_command(store, protected, out), env=environment(**told)).returncode == 0
    out.unlink()
    told = {"PBS_MASTER_KEY_PASSWORD": "wrong", "PBS_ENCRYPTION_PASSWORD": PASSWORD}
    assert error_of(pbsfs(*recover_command(store, protected, out), env=environment(**told)), 18)


def test_at_a_terminal_the_password_is_asked_for_unseen(store: Path, protected: Path, tmp_path: Path) -> None:
    out = tmp_path / "key.json"
    command = [PBSFS, *recover_command(store, protected, out)]
    question = f"password of the master key {protected}"
    status, text = at_a_terminal(command, [(question, PASSWORD)], environment())
    assert status == 0, text
    assert PASSWORD not in text
    check_file(out)


def test_a_missing_or_wrong_password_is_status_18_and_leaves_nothing(
    store: Path, protected: Path, tmp_path: Path
) -> None:
    out = tmp_path / "key.json"
    command = recover_command(store, protected, out)
    assert "set PBS_MASTER_KEY_PASSWORD (or _FD, _FILE, _CMD)" in error_of(pbsfs(*command), 18)
    for wrong in ("wrong", "", "x" * 3000):
        done = pbsfs(*command, env=environment(PBS_MASTER_KEY_PASSWORD=wrong))
        text = f"master key {protected}: wrong password, or the file is damaged; give its password "
        assert error_of(done, 18).startswith(text)
    assert not out.exists()


def test_what_is_there_is_not_overwritten_not_even_through_a_link(
    store: Path, private: Path, tmp_path: Path
) -> None:
    out = tmp_path / "key.json"
    out.write_text("precious")
    assert f"{out} exists" in error_of(pbsfs(*recover_command(store, private, out)), 8)
    assert out.read_text() == "precious"
    (link := tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert f"{link} exists" in error_of(pbsfs(*recover_command(store, private, link)), 8)
    assert not (tmp_path / "nowhere").exists()


def test_what_can_not_be_written_is_status_8(store: Path, private: Path, tmp_path: Path) -> None:
    text = error_of(pbsfs(*recover_command(store, private, tmp_path / "none" / "key.json")), 8)
    assert "No such file or directory" in text


def test_another_master_key_is_status_19_and_leaves_nothing(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "key.json"
    (path := tmp_path / "other.pem").write_bytes(pem(rsa.generate_private_key(65537, 2048)))
    assert "was not encrypted for this master key" in error_of(pbsfs(*recover_command(store, path, out)), 19)
    # With a longer one not even the length fits.
    path.write_bytes(pem(rsa.generate_private_key(65537, 3072)))
    assert "was not encrypted for this master key" in error_of(pbsfs(*recover_command(store, path, out)), 19)
    assert not out.exists()


def test_what_is_no_private_rsa_key_is_status_19(
    store: Path, master: rsa.RSAPrivateKey, tmp_path: Path
) -> None:
    out, path = tmp_path / "key.json", tmp_path / "given.pem"
    public = master.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    for content, words in (
        (b"", "not a private key in PEM form"),
        (b"\0" * 100, "not a private key in PEM form"),
        (pem(master)[:-200], "not a private key in PEM form"),
        (public, "not a private key in PEM form"),
        (key_file(), "not a private key in PEM form"),
        (pem(ec.generate_private_key(ec.SECP256R1())), "not an RSA key"),
        (b" " * (2 << 20), "too long"),
    ):
        path.write_bytes(content)
        text = error_of(pbsfs(*recover_command(store, path, out)), 19)
        assert str(path) in text
        assert words in text
    assert "No such file" in error_of(pbsfs(*recover_command(store, tmp_path / "none", out)), 19)
    assert not out.exists()


def test_a_snapshot_without_such_a_key_is_status_3(store: Path, private: Path, tmp_path: Path) -> None:
    out = tmp_path / "key.json"
    text = error_of(pbsfs(*recover_command(store, private, out, "vm/100/latest")), 3)
    assert "holds no key for a master key" in text
    assert "there is no '999'" in error_of(pbsfs(*recover_command(store, private, out, "vm/999")), 3)
    for path in ("vm/106", f"{SNAPSHOT}/drive-scsi0.img"):
        assert "is not a snapshot" in error_of(pbsfs(*recover_command(store, private, out, path)), 2)
    assert not out.exists()


def test_a_sealed_key_that_was_damaged_is_told_and_nothing_written(
    store: Path, private: Path, tmp_path: Path
) -> None:
    path, out = store / SNAPSHOT / MASTER_KEY_BLOB.filename, tmp_path / "key.json"
    sealed = path.read_bytes()
    path.write_bytes(sealed[:-1] + bytes([sealed[-1] ^ 1]))
    assert "checksum differs from the manifest" in error_of(pbsfs(*recover_command(store, private, out)), 6)
    assert not out.exists()


def test_a_sealed_key_that_contradicts_itself_is_told_and_nothing_written(
    writer: DatastoreWriter, master: rsa.RSAPrivateKey, private: Path, tmp_path: Path
) -> None:
    whole = document(fingerprint=made.OTHER_KEY.fingerprint)
    small = json.dumps({name: whole[name] for name in ("kdf", "data", "fingerprint")}).encode()
    add_with_master_key(writer, master.public_key().encrypt(small, PKCS1v15()))
    out = tmp_path / "key.json"
    text = error_of(pbsfs(*recover_command(writer.path, private, out)), 6)
    assert text.startswith(f"the key of {SNAPSHOT}: ")
    assert made.KEY.fingerprint in text
    assert not out.exists()


def test_a_key_of_this_host_that_is_another_is_not_in_the_way(
    store: Path, private: Path, tmp_path: Path
) -> None:
    home = tmp_path / "config" / "proxmox-backup"
    home.mkdir(parents=True)
    (home / "encryption-key.json").write_bytes(key_file(key=made.OTHER_KEY.reveal()))
    out = tmp_path / "key.json"
    told = environment(XDG_CONFIG_HOME=str(tmp_path / "config"))
    done = pbsfs(*recover_command(store, private, out), env=told)
    assert (done.returncode, done.stderr) == (0, "")
    check_file(out)


# --- key recover, on golden data


@pytest.mark.golden
@pytest.mark.parametrize("name", ["master-private.pem", "master-private-encrypted.pem"])
def test_the_golden_master_key_opens_the_golden_image(tmp_path: Path, name: str) -> None:
    out, copy = tmp_path / "key.json", tmp_path / "copy"
    told = environment(PBS_MASTER_KEY_PASSWORD="correct-horse")
    command = recover_command(golden.DATASTORE, golden.ROOT / "keys" / name, out, "vm/106/latest")
    done = pbsfs(*command, env=told)
    assert (done.returncode, done.stderr) == (0, "")
    wanted = json.loads((golden.ROOT / "keys" / "pbkdf2.json").read_text())["fingerprint"]
    assert wanted in done.stdout
    (original,) = [o for o in golden.originals() if o.path.startswith("vm/106/") and o.path.endswith(".img")]
    output_of(PBSFS, "export", "--datastore-dir", golden.DATASTORE, "--keyfile", out, original.path, copy)
    assert output_of("sha256sum", copy).split()[0] == original.sha256
