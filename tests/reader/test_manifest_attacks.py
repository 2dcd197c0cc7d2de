"""Manifests that were changed or swapped: no byte of what they list gets out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from pbsfs.base.errors import DamageError, KeyRequiredError
from pbsfs.base.names import CLIENT_LOG, MANIFEST
from pbsfs.formats import blob
from pbsfs.formats.keys import Key
from pbsfs.formats.manifest import CryptMode
from tests.reader.sealed import (
    ANOTHER,
    DISK,
    DOES_NOT_MATCH,
    LOG,
    NEWER,
    OLDER,
    Attack,
    Target,
    check_key_required,
    check_others,
    contents,
    each_mode,
    each_source,
    first,
    ring,
    seen_in,
    target,
)
from tests.support import damage
from tests.support.made import KEY, OTHER_KEY, TIME


def flip_hex(text: str) -> str:
    return ("1" if text[0] == "0" else "0") + text[1:]


def add_file(attacked: Target) -> None:
    raw = blob.encode(b"evil")
    (attacked.place / "evil.blob").write_bytes(raw)
    csum = blob.chunk_digest(raw, None).hex()
    entry = {"filename": "evil.blob", "crypt-mode": "none", "size": len(raw), "csum": csum}
    attacked.forge(lambda data: data["files"].append(entry))


def rename_file(attacked: Target) -> None:
    shutil.copy(attacked.place / DISK, attacked.place / "new.img.fidx")
    attacked.forge(lambda data: first(data).update(filename="new.img.fidx"))


def swap_names(data: dict[str, Any]) -> None:
    one, two = data["files"][:2]
    one["filename"], two["filename"] = two["filename"], one["filename"]


def other_mode(data: dict[str, Any]) -> None:
    modes = {"encrypt": "sign-only", "sign-only": "encrypt"}
    first(data).update({"crypt-mode": modes[first(data)["crypt-mode"]]})


NO_SIGNATURE = "has no signature"
OF_ANOTHER = "it is the manifest of another snapshot"

ON_THE_MANIFEST: dict[str, tuple[Attack, str]] = {
    "a digit of the signature": (
        lambda t: t.forge(lambda d: d.update(signature=flip_hex(d["signature"]))),
        DOES_NOT_MATCH,
    ),
    "the signature is null": (lambda t: t.forge(lambda d: d.update(signature=None)), NO_SIGNATURE),
    "the signature is gone": (lambda t: t.forge(lambda d: d.pop("signature")), NO_SIGNATURE),
    "the signature is empty": (lambda t: t.forge(lambda d: d.update(signature="")), DOES_NOT_MATCH),
    "the signature is no text": (lambda t: t.forge(lambda d: d.update(signature="\ud800")), DOES_NOT_MATCH),
    "signature and fingerprint are gone": (
        lambda t: t.forge(lambda d: (d.pop("signature"), d["unprotected"].pop("key-fingerprint"))),
        NO_SIGNATURE,
    ),
    "signed with another key": (lambda t: t.forge(lambda _d: None, key=OTHER_KEY), DOES_NOT_MATCH),
    "a checksum": (
        lambda t: t.forge(lambda d: first(d).update(csum=flip_hex(first(d)["csum"]))),
        DOES_NOT_MATCH,
    ),
    "a size": (lambda t: t.forge(lambda d: first(d).update(size=first(d)["size"] - 512)), DOES_NOT_MATCH),
    "another crypt mode": (lambda t: t.forge(other_mode), DOES_NOT_MATCH),
    "crypt mode none": (lambda t: t.forge(lambda d: first(d).update({"crypt-mode": "none"})), DOES_NOT_MATCH),
    "no crypt mode": (lambda t: t.forge(lambda d: first(d).pop("crypt-mode")), DOES_NOT_MATCH),
    "a file more": (add_file, DOES_NOT_MATCH),
    "a file less": (lambda t: t.forge(lambda d: d["files"].pop()), DOES_NOT_MATCH),
    "a file of another name": (rename_file, DOES_NOT_MATCH),
    "files whose names were swapped": (lambda t: t.forge(swap_names), DOES_NOT_MATCH),
    "a member more": (lambda t: t.forge(lambda d: d.update(more=1)), DOES_NOT_MATCH),
    "another time": (lambda t: t.forge(lambda d: d.update({"backup-time": TIME})), DOES_NOT_MATCH),
    "another id": (lambda t: t.forge(lambda d: d.update({"backup-id": "101"})), DOES_NOT_MATCH),
    "another type": (lambda t: t.forge(lambda d: d.update({"backup-type": "host"})), DOES_NOT_MATCH),
    "the manifest of another group": (lambda t: t.take_from(ANOTHER, MANIFEST.filename), OF_ANOTHER),
    "all of another group's snapshot": (lambda t: t.take_from(ANOTHER), OF_ANOTHER),
    "the manifest of an older snapshot": (lambda t: t.take_from(OLDER, MANIFEST.filename), OF_ANOTHER),
    "all of an older snapshot": (lambda t: t.take_from(OLDER), OF_ANOTHER),
}


@each_source
@each_mode
@pytest.mark.parametrize("name", ON_THE_MANIFEST)
def test_a_manifest_that_was_changed_or_swapped_lets_nothing_through(
    tmp_path: Path, kind: str, mode: CryptMode, name: str
) -> None:
    attack, reason = ON_THE_MANIFEST[name]
    attacked = target(tmp_path / "datastore", mode)
    attack(attacked)
    seen, others = seen_in(kind, attacked.writer.path, ring(KEY, OTHER_KEY), NEWER, OLDER)
    assert seen.data == {}
    assert MANIFEST.filename in seen.errors
    assert len(seen.errors) > 4
    for error in seen.errors.values():
        assert type(error) is DamageError
        assert reason in str(error)
        assert str(error).startswith(f"{NEWER}/index.json.blob: ")
    check_others(others)


@each_source
@each_mode
def test_a_newer_manifest_in_the_place_of_an_older_is_refused_too(
    tmp_path: Path, kind: str, mode: CryptMode
) -> None:
    attacked = target(tmp_path / "datastore", mode)
    older = attacked.writer.snapshot_path(OLDER)
    for path in attacked.place.iterdir():
        damage.replace(older / path.name, path.read_bytes())
    (seen,) = seen_in(kind, attacked.writer.path, ring(KEY), OLDER)
    assert seen.data == {}
    assert all(OF_ANOTHER in str(error) for error in seen.errors.values())


@each_source
@each_mode
@pytest.mark.parametrize("signer", [None, OTHER_KEY], ids=["as it was", "signed with it"])
def test_a_manifest_that_names_a_key_that_is_not_given_is_not_read_while_keys_are_given(
    tmp_path: Path, kind: str, mode: CryptMode, signer: Key | None
) -> None:
    attacked = target(tmp_path / "datastore", mode)

    def rename_key(data: dict[str, Any]) -> None:
        data["unprotected"]["key-fingerprint"] = OTHER_KEY.fingerprint

    attacked.forge(rename_key, key=signer)
    seen, others = seen_in(kind, attacked.writer.path, ring(KEY), NEWER, OLDER)
    assert set(seen.errors) >= set(contents(1))
    check_key_required(seen.errors.values(), NEWER, OTHER_KEY.fingerprint)
    assert set(seen.data) <= {MANIFEST.filename, CLIENT_LOG.filename}
    check_others(others)
    # Where that key is given too, the signature tells.
    (seen,) = seen_in(kind, attacked.writer.path, ring(KEY, OTHER_KEY), NEWER)
    if signer is None:
        assert all(DOES_NOT_MATCH in str(error) for error in seen.errors.values())
        assert seen.data == {}


@each_source
@each_mode
def test_a_manifest_that_names_no_key_is_tried_with_those_that_are_given(
    tmp_path: Path, kind: str, mode: CryptMode
) -> None:
    attacked = target(tmp_path / "datastore", mode)
    attacked.forge(lambda data: data["unprotected"].pop("key-fingerprint"))
    (seen,) = seen_in(kind, attacked.writer.path, ring(OTHER_KEY, KEY), NEWER)
    assert seen.errors == {}
    assert contents(1).items() <= seen.data.items()
    assert seen.data[CLIENT_LOG.filename] == LOG
    (seen,) = seen_in(kind, attacked.writer.path, ring(OTHER_KEY), NEWER)
    assert set(seen.errors) >= set(contents(1))
    check_key_required(seen.errors.values(), NEWER, "(the manifest does not name it)")


@each_source
def test_what_is_unprotected_may_change_freely(tmp_path: Path, kind: str) -> None:
    attacked = target(tmp_path / "datastore", CryptMode.ENCRYPT)
    attacked.forge(
        lambda data: data["unprotected"].update(
            notes="new", verify_state={"state": "failed", "upid": "UPID:x"}
        )
    )
    (seen,) = seen_in(kind, attacked.writer.path, ring(KEY), NEWER)
    assert seen.errors == {}
    assert contents(1).items() <= seen.data.items()


@each_source
def test_an_encrypted_backup_that_is_said_to_be_plain_is_not_decrypted(tmp_path: Path, kind: str) -> None:
    # Nothing is left by which it could be told from a plain backup, but what is encrypted stays that.
    attacked = target(tmp_path / "datastore", CryptMode.ENCRYPT)

    def strip(data: dict[str, Any]) -> None:
        data.update(signature=None, unprotected={})
        for entry in data["files"]:
            entry["crypt-mode"] = "none"

    attacked.forge(strip)
    (seen,) = seen_in(kind, attacked.writer.path, ring(KEY), NEWER)
    assert set(seen.errors) >= set(contents(1))
    for name in contents(1):
        assert type(seen.errors[name]) is DamageError
        assert "the blob is encrypted, but must not be" in str(seen.errors[name])
        assert seen.data.get(name, b"") == b""


def test_a_fingerprint_with_terminal_codes_is_told_without_them(tmp_path: Path) -> None:
    attacked = target(tmp_path / "datastore", CryptMode.ENCRYPT)
    attacked.forge(lambda data: data["unprotected"].update({"key-fingerprint": "\x1b[2Jx\n" * 50}))
    for keys in (ring(KEY), ring()):
        (seen,) = seen_in("directory", attacked.writer.path, keys, NEWER)
        assert set(seen.errors) >= set(contents(1))
        for error in seen.errors.values():
            assert isinstance(error, KeyRequiredError)
            assert str(error).isprintable()
            assert len(str(error)) < 500


def test_the_keys_that_were_given_are_not_all_told_where_they_are_many(tmp_path: Path) -> None:
    attacked = target(tmp_path / "datastore", CryptMode.ENCRYPT)
    keys = ring(*(Key(bytes([n] * 32)) for n in range(100)))
    (seen,) = seen_in("directory", attacked.writer.path, keys, NEWER)
    assert "(100 in all)" in str(seen.errors[DISK])
    assert len(str(seen.errors[DISK])) < 1200
