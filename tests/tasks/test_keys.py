"""Reading key files and decrypting the key of a backup, without the command line."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15

from pbsfs.base.errors import KeyFileError, OutputError, PasswordError
from pbsfs.base.secret import Secret
from pbsfs.formats.keyfile import KeyFile
from pbsfs.tasks.keys import decrypt, fingerprint_of, read, write
from tests.support import made
from tests.support.keyfiles import document

NAME = Path("private.pem")
PRIVATE = rsa.generate_private_key(public_exponent=65537, key_size=2048)


def pem(password: bytes | None = None) -> bytes:
    protection = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8
    return PRIVATE.private_bytes(serialization.Encoding.PEM, form, protection)


def nobody() -> Secret:
    raise AssertionError("nobody should be asked")


@pytest.fixture
def key_text() -> bytes:
    return json.dumps(document("none")).encode()


def test_a_key_is_decrypted_and_only_a_protected_master_key_asks(key_text: bytes) -> None:
    sealed = PRIVATE.public_key().encrypt(key_text, PKCS1v15())
    assert decrypt(sealed, pem(), NAME, nobody) == key_text
    assert decrypt(sealed, pem(b"secret"), NAME, lambda: Secret("secret")) == key_text
    with pytest.raises(PasswordError, match="wrong password, or the file is damaged"):
        decrypt(sealed, pem(b"secret"), NAME, lambda: Secret("other"))
    with pytest.raises(KeyFileError, match="was not encrypted for this master key"):
        decrypt(sealed[::-1], pem(), NAME, nobody)
    with pytest.raises(KeyFileError, match="not a private key in PEM form; give the private RSA key"):
        decrypt(sealed, b"junk", NAME, nobody)


def test_a_key_without_a_password_tells_its_own_fingerprint(key_text: bytes) -> None:
    assert fingerprint_of(KeyFile.parse(key_text)) == made.KEY.fingerprint


def test_a_file_that_is_too_long_is_not_read_whole(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_bytes(b"1234")
    assert read("key file", file, 4) == b"1234"
    with pytest.raises(KeyFileError, match="too long for a key"):
        read("key file", file, 3)
    with pytest.raises(KeyFileError, match=r"key file .*none: No such file"):
        read("key file", tmp_path / "none", 3)


def test_a_key_is_written_for_its_owner_only_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "key", b"text")
    assert (tmp_path / "key").read_bytes() == b"text"
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    with pytest.raises(OutputError, match="File exists"):
        write(tmp_path / "key", b"other")
    real = os.open

    def full(path: Path, how: int, mode: int) -> int:
        os.close(real(path, how, mode))
        return real("/dev/full", os.O_WRONLY)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(OutputError, match=os.strerror(errno.ENOSPC)):
        write(tmp_path / "second", b"text")
    assert not (tmp_path / "second").exists()
