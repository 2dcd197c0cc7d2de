"""Manifests: what matters is taken strictly, what is unknown is left alone."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbsfs.base.errors import DamageError
from pbsfs.base.names import Archive
from pbsfs.formats import manifest
from pbsfs.formats.manifest import CryptMode, Manifest, ManifestFile

CSUM = "0123456789abcdef" * 4

JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(),
        st.sampled_from(["vm", "100", "none", "encrypt", CSUM, "a.blob", "disk.img.fidx"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(), inner, max_size=4)),
    max_leaves=10,
)


def file_entry(**changes: Any) -> dict[str, Any]:
    entry = {"filename": "disk.img.fidx", "crypt-mode": "none", "size": 512, "csum": CSUM}
    return {**entry, **{name.replace("_", "-"): value for name, value in changes.items()}}


def document(**changes: Any) -> dict[str, Any]:
    """A manifest with one file, and with other values for some members."""
    whole: dict[str, Any] = {
        "backup-type": "vm",
        "backup-id": "100",
        "backup-time": 1_700_000_000,
        "files": [file_entry()],
        "unprotected": {},
        "signature": None,
    }
    return {**whole, **{name.replace("_", "-"): value for name, value in changes.items()}}


def parse(data: object) -> Manifest:
    return Manifest.parse(json.dumps(data).encode())


# --- what it says


def test_a_manifest_as_the_vendor_writes_it_is_understood() -> None:
    text = b"""{"backup-type":"vm","backup-id":"100","backup-time":1700000000,
     "files":[
      {"filename":"drive-scsi0.img.fidx","crypt-mode":"encrypt","size":1234,"csum":"%(csum)s"},
      {"filename":"qemu-server.conf.blob","crypt-mode":"sign-only","size":0,"csum":"%(csum)s"},
      {"filename":"root.pxar.didx","crypt-mode":"none","size":9223372036854775807,"csum":"%(csum)s"}],
     "unprotected":{"key-fingerprint":"aa:bb","notes":"first line\\nsecond \\u00e9",
      "verify_state":{"state":"ok","upid":"UPID:x"},"chunk_upload_stats":{"count":1}},
     "signature":"00"}""" % {b"csum": CSUM.encode()}
    csum = bytes.fromhex(CSUM)

    assert replace(Manifest.parse(text), signed=b"") == Manifest(
        backup_type="vm",
        backup_id="100",
        backup_time=1_700_000_000,
        files=(
            ManifestFile(Archive("drive-scsi0.img.fidx"), CryptMode.ENCRYPT, 1234, csum),
            ManifestFile(Archive("qemu-server.conf.blob"), CryptMode.SIGN_ONLY, 0, csum),
            ManifestFile(Archive("root.pxar.didx"), CryptMode.NONE, (1 << 63) - 1, csum),
        ),
        key_fingerprint="aa:bb",
        notes="first line\nsecond é",
        verify_state="ok",
        unknown=(),
        signature="00",
    )


def test_a_file_without_a_crypt_mode_is_not_encrypted() -> None:
    entry = file_entry()
    del entry["crypt-mode"]
    assert parse(document(files=[entry])).files[0].crypt_mode is CryptMode.NONE
    assert parse(document(files=[file_entry(crypt_mode=None)])).files[0].crypt_mode is CryptMode.NONE


def test_members_that_are_not_known_change_nothing() -> None:
    more = document(
        files=[file_entry(colour="blue")], colour={"is": ["blue"]}, unprotected={"colour": 1, "notes": "n"}
    )
    assert parse(more) == parse(document(unprotected={"notes": "n"}))


def test_files_of_a_kind_that_is_not_known_are_named_and_left_out() -> None:
    names = ["disk.img.fidx", "state.zst", "../evil.blob", "", ".fidx", "a\n.blob", "x.mpxar.xidx"]
    found = parse(document(files=[{"filename": name} if n else file_entry() for n, name in enumerate(names)]))

    assert [file.archive.filename for file in found.files] == ["disk.img.fidx"]
    assert list(found.unknown) == names[1:]


@pytest.mark.parametrize("value", [None, 1, True, [], {}, ["text"]])
def test_unprotected_members_of_another_kind_are_none(value: object) -> None:
    odd = {"key-fingerprint": value, "notes": value, "verify_state": {"state": value}}
    for unprotected in (odd, {**odd, "verify_state": value}, value):
        found = parse(document(unprotected=unprotected))
        assert (found.key_fingerprint, found.notes, found.verify_state) == (None, None, None)


def test_half_a_surrogate_pair_becomes_text_that_can_be_encoded() -> None:
    text = json.dumps(document(unprotected={"notes": "a\ud800b"})).encode()
    assert b"\\ud800" in text
    assert Manifest.parse(text).notes == "a?b"


@given(
    st.lists(
        st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,20}\.(blob|fidx|didx)", fullmatch=True), unique=True
    ),
    st.sampled_from(CryptMode),
    st.integers(0, (1 << 63) - 1),
    st.binary(min_size=32, max_size=32),
    st.text(),
)
def test_what_is_encoded_parses_to_the_same(
    names: list[str], mode: CryptMode, size: int, csum: bytes, notes: str
) -> None:
    files = tuple(ManifestFile(Archive(name), mode, size, csum) for name in names)
    text = manifest.encode(
        backup_type="ct", backup_id="x_1.y", backup_time=size, files=files, unprotected={"notes": notes}
    )
    found = Manifest.parse(text)

    assert found == Manifest("ct", "x_1.y", size, files, None, notes, None, ())


# --- every check


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"nonsense",
        b"\xff\xfe\x00",
        b'{"a": "\xff"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"1" * 100_000,
        b'{"backup-time": NaN}',
        b"Infinity",
        b"-Infinity",
        json.dumps(document()).encode() + b"x",
        json.dumps(document()).encode()[:-1],
    ],
)
def test_what_is_not_json_is_refused(text: bytes) -> None:
    with pytest.raises(DamageError, match="manifest is not"):
        Manifest.parse(text)


@pytest.mark.parametrize("data", [None, True, 1, 1.5, "text", [], [document()]])
def test_json_that_is_no_object_is_refused(data: object) -> None:
    with pytest.raises(DamageError, match="not a JSON object"):
        parse(data)


@pytest.mark.parametrize(
    ("member", "values"),
    [
        ("backup-type", [None, "", "vm ", "VM", "ns", 1, [], {}, ["vm"]]),
        ("backup-id", [None, "", ".", "..", "a/b", "-x", "a b", 100, [], "x" * 256]),
        ("backup-time", [None, "1700000000", -1, 1.5, True, 1 << 63, [], {}]),
        ("files", [None, {}, "disk.img.fidx", 1, [None], [1], ["disk.img.fidx"], [[]], [{}]]),
    ],
)
def test_members_that_matter_are_needed_and_checked(member: str, values: list[object]) -> None:
    missing = document()
    del missing[member]
    for damaged in [missing, *({**document(), member: value} for value in values)]:
        with pytest.raises(DamageError, match="manifest has"):
            parse(damaged)


@pytest.mark.parametrize(
    ("member", "values"),
    [
        ("filename", [None, 1, [], {}]),
        ("crypt-mode", ["", "NONE", "encrypted", 0, False, [], {}, ["none"]]),
        ("size", [None, "512", -1, 1.0, True, 1 << 63, []]),
        ("csum", [None, "", CSUM[:-1], CSUM[:-2], CSUM + "00", "g" * 64, "é" * 64, 1, []]),
    ],
)
def test_every_member_of_a_file_is_checked(member: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(DamageError, match="manifest has"):
            parse(document(files=[{**file_entry(), member: value}]))


def test_a_file_that_is_named_twice_is_refused() -> None:
    with pytest.raises(DamageError, match=r"names disk\.img\.fidx twice"):
        parse(document(files=[file_entry(), file_entry(size=1)]))


# --- anything at all


@given(JSON)
def test_arbitrary_json_raises_nothing_but_damage(data: object) -> None:
    with pytest.raises(DamageError):
        parse(data)


@given(st.sampled_from(sorted(document())), JSON)
def test_an_arbitrary_member_raises_nothing_but_damage(member: str, value: object) -> None:
    parse_or_damage({**document(), member: value})


@given(st.sampled_from(sorted(file_entry())), JSON)
def test_an_arbitrary_member_of_a_file_raises_nothing_but_damage(member: str, value: object) -> None:
    parse_or_damage(document(files=[{**file_entry(), member: value}]))


def parse_or_damage(data: object) -> None:
    try:
        found = parse(data)
    except DamageError:
        return
    assert all(0 <= file.size < 1 << 63 and len(file.csum) == 32 for file in found.files)
    for text in (found.notes, found.verify_state, found.key_fingerprint):
        assert text is None or text.encode().decode() == text


@given(st.binary())
def test_arbitrary_bytes_raise_nothing_but_damage(text: bytes) -> None:
    with pytest.raises(DamageError):
        Manifest.parse(text)
