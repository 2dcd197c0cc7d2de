"""Signatures of manifests: the vendor's match, and no change of what they cover goes unnoticed."""

from __future__ import annotations

import copy
import hashlib
import hmac
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pbsfs.base.errors import DamageError
from pbsfs.base.names import MANIFEST
from pbsfs.formats import blob
from pbsfs.formats.keyfile import KeyFile
from pbsfs.formats.keys import Key
from pbsfs.formats.manifest import Manifest
from tests.support import golden
from tests.support.made import KEY, OTHER_KEY

ID_KEY = bytes.fromhex("7c2c013efd07f3b25717a485263343cd4d292a4b65c200bb3b18ea227abe225c")
"""PBKDF2-HMAC-SHA256 of 00…1f, the bytes of `KEY`, with the salt `_id_key`, 10 iterations."""

CSUM = "0123456789abcdef" * 4


def document() -> dict[str, Any]:
    """A manifest with everything that there is, not signed yet."""
    return {
        "backup-type": "vm",
        "backup-id": "100",
        "backup-time": 1_700_000_000,
        "files": [
            {"filename": "disk.img.fidx", "crypt-mode": "encrypt", "size": 512, "csum": CSUM},
            {"filename": "qemu-server.conf.blob", "crypt-mode": "sign-only", "size": 1, "csum": CSUM},
        ],
        "unprotected": {"key-fingerprint": KEY.fingerprint, "notes": "n"},
        "signature": None,
    }


def signed_by_hand(data: dict[str, Any], canonical: bytes, id_key: bytes = ID_KEY) -> Manifest:
    """The manifest `data`, signed over `canonical`."""
    signature = hmac.new(id_key, canonical, hashlib.sha256).hexdigest()
    return Manifest.parse(json.dumps({**data, "signature": signature}).encode())


def signed(data: dict[str, Any] | None = None) -> dict[str, Any]:
    """`data`, signed under `KEY`; its canonical form is what Python's encoder makes of plain ASCII."""
    data = copy.deepcopy(data or document())
    covered = {name: value for name, value in data.items() if name not in ("unprotected", "signature")}
    text = json.dumps(covered, sort_keys=True, separators=(",", ":")).encode()
    data["signature"] = hmac.new(ID_KEY, text, hashlib.sha256).hexdigest()
    assert matches(data)
    return data


def matches(data: dict[str, Any], key: Key = KEY) -> bool:
    return Manifest.parse(json.dumps(data).encode()).is_signed_by(key)


# --- the vendor's


def test_the_vendors_test_vector() -> None:
    key = Key(hashlib.scrypt(b"test", salt=b"", n=65536, r=8, p=1, dklen=32, maxmem=1 << 27))
    text = b"""{"files":[
      {"size":200,"csum":"%s","filename":"test1.img.fidx","crypt-mode":"encrypt"},
      {"size":200,"csum":"%s","filename":"abc.blob","crypt-mode":"none"}],
     "backup-time":1593179765,"backup-type":"host","backup-id":"elsa","unprotected":{"note":"any"},
     "signature":"d7b446fb7db081662081d4b40fedd858a1d6307a5aff4ecff7d5bf4fd35679e9"}"""
    manifest = Manifest.parse(text % (b"01" * 32, b"02" * 32))

    assert manifest.is_signed_by(key)
    assert not manifest.is_signed_by(KEY)
    assert not Manifest.parse(text % (b"01" * 32, b"03" * 32)).is_signed_by(key)


@pytest.fixture(scope="module")
def golden_keys() -> dict[str, Key]:
    password = b"correct-horse"
    names = ("plain", "scrypt", "pbkdf2", "other")
    files = {name: KeyFile.parse((golden.ROOT / "keys" / f"{name}.json").read_bytes()) for name in names}
    return {(key := file.unlock(password)).fingerprint: key for file in files.values()}


MANIFESTS = sorted(golden.DATASTORE.rglob(MANIFEST.filename)) if golden.is_there() else []


def text_of(path: Path) -> bytes:
    return blob.decode(path.read_bytes(), max_size=1 << 20, encrypted=False)


SIGNED = [path for path in MANIFESTS if json.loads(text_of(path))["signature"]]


@pytest.mark.golden
def test_the_golden_data_has_manifests_signed_with_every_kind_of_key(golden_keys: dict[str, Key]) -> None:
    named = {Manifest.parse(text_of(path)).key_fingerprint for path in SIGNED}
    assert len(SIGNED) == 6
    assert len(named) == 3
    assert named < set(golden_keys)


@pytest.mark.golden
@pytest.mark.parametrize(
    "path", [pytest.param(p, id=str(p.parent.relative_to(golden.DATASTORE))) for p in SIGNED]
)
def test_every_golden_manifest_is_signed_with_its_key_and_no_other(
    golden_keys: dict[str, Key], path: Path
) -> None:
    manifest = Manifest.parse(text_of(path))
    matching = [name for name, key in golden_keys.items() if manifest.is_signed_by(key)]
    assert matching == [manifest.key_fingerprint]


@pytest.mark.golden
def test_a_golden_manifest_that_is_not_signed_matches_no_key(golden_keys: dict[str, Key]) -> None:
    unsigned = [Manifest.parse(text_of(path)) for path in MANIFESTS if path not in SIGNED]
    assert len(unsigned) == 9
    for manifest in unsigned:
        assert not manifest.needs_key
        assert not any(manifest.is_signed_by(key) for key in golden_keys.values())


@pytest.mark.golden
def test_every_bit_of_a_golden_manifest_that_flips_is_noticed_unless_it_is_unprotected(
    golden_keys: dict[str, Key],
) -> None:
    path = next(path for path in SIGNED if "vm/103" in str(path))
    data = json.loads(text_of(path))
    key = golden_keys[data["unprotected"]["key-fingerprint"]]
    del data["unprotected"]
    check_every_bit(json.dumps(data).encode(), key)


# --- the canonical form


def test_members_are_sorted_at_every_level_and_nothing_stands_between_them() -> None:
    data = {**document(), "Z": {"b": 1, "a": {"y": [{"q": 1, "p": 2}], "x": []}, "B": {}}, "aa": True}
    canonical = (
        b'{"Z":{"B":{},"a":{"x":[],"y":[{"p":2,"q":1}]},"b":1},"aa":true,"backup-id":"100",'
        b'"backup-time":1700000000,"backup-type":"vm","files":['
        b'{"crypt-mode":"encrypt","csum":"%(csum)s","filename":"disk.img.fidx","size":512},'
        b'{"crypt-mode":"sign-only","csum":"%(csum)s","filename":"qemu-server.conf.blob","size":1}]}'
    ) % {b"csum": CSUM.encode()}
    assert signed_by_hand(data, canonical).is_signed_by(KEY)
    assert not signed_by_hand(data, canonical).is_signed_by(OTHER_KEY)
    assert not signed_by_hand(data, canonical + b" ").is_signed_by(KEY)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ('"\\/', rb"\"\\/"),
        ("\b\f\n\r\t", rb"\b\f\n\r\t"),
        ("\0\x01\x0b\x1f", rb"\u0000\u0001\u000b\u001f"),
        ("\x7f\x80", b"\x7f\xc2\x80"),
        ("é€😀\u2028", "é€😀\u2028".encode()),
    ],
    ids=ascii,
)
def test_texts_have_jsons_least_escapes_and_are_utf_8(text: str, canonical: bytes) -> None:
    rest = b'"backup-id":"100","backup-time":1700000000,"backup-type":"vm","files":[]'
    for data, form in (
        ({"a": text}, b'{"a":"%s",%s}' % (canonical, rest)),
        ({"a": {text: 1}}, b'{"a":{"%s":1},%s}' % (canonical, rest)),
    ):
        assert signed_by_hand({**document(), "files": [], **data}, form).is_signed_by(KEY)


def test_members_are_sorted_by_code_point_and_not_by_utf_16() -> None:
    rest = b'"backup-id":"100","backup-time":1700000000,"backup-type":"vm","files":[]'
    data = {**document(), "files": [], "a": {"\U0001f600": 1, "\uffee": 2, "z": 3, "é": 4}}
    canonical = '{"a":{"z":3,"é":4,"\uffee":2,"\U0001f600":1},'.encode() + rest + b"}"
    assert signed_by_hand(data, canonical).is_signed_by(KEY)


@given(st.permutations(sorted(document())), st.booleans())
def test_the_order_and_layout_of_what_is_stored_do_not_matter(names: list[str], spaced: bool) -> None:
    data = signed()
    text = json.dumps({name: data[name] for name in names}, indent=3 if spaced else None)
    assert Manifest.parse(text.encode()).is_signed_by(KEY)


def test_members_that_are_not_known_are_covered() -> None:
    data = signed({**document(), "colour": {"is": ["blue"]}})
    data["files"][0]["shade"] = "dark"
    assert not matches(data)
    data = signed(data)
    changes: list[Callable[[dict[str, Any]], object]] = [
        lambda d: d.pop("colour"),
        lambda d: d["colour"]["is"].append("red"),
        lambda d: d["files"][0].update(shade="light"),
        lambda d: d.update(more=None),
    ]
    for change in changes:
        changed = copy.deepcopy(data)
        change(changed)
        assert not matches(changed)


@pytest.mark.parametrize("number", ["1.5", "1.0", "1e3", "-0.0", "1E400", "-1e-400"])
def test_a_number_that_is_not_whole_has_no_canonical_form(number: str) -> None:
    for place in ('"a":%s', '"a":[1,{"b":%s}]'):
        data = signed()
        for signature in (data["signature"], KEY.sign(b"").hex()):  # nor does that of nothing match
            text = json.dumps({**data, "signature": signature}).encode()
            manifest = Manifest.parse(b"{" + (place % number).encode() + b"," + text[1:])
            assert manifest.signature == signature
            assert manifest.signed == b""
            assert not manifest.is_signed_by(KEY)


def test_half_a_surrogate_pair_has_no_canonical_form() -> None:
    for data in ({"a": "\ud800"}, {"\udfff": 1}, {"a": [{"b": "x\udc00"}]}):
        assert not matches({**document(), **data, "signature": KEY.sign(b"").hex()})


def test_what_is_nested_too_deep_is_not_signed_and_does_no_harm() -> None:
    for depth in (100, 900, 990, 5000):
        nested = b"[" * depth + b"]" * depth
        text = b'{"a":' + nested + b"," + json.dumps(signed()).encode()[1:]
        try:
            manifest = Manifest.parse(text)
        except DamageError:
            continue
        assert not manifest.is_signed_by(KEY)


@pytest.mark.parametrize(
    "change",
    [
        ('"backup-id": "100"', '"backup-id": "101", "backup-id": "100"'),
        ('"backup-id": "100"', '"backup-id": "100", "backup-id": "100"'),
        ('"size": 512', '"size": 1, "size": 512'),
        ('"notes": "n"', '"notes": "n", "notes": "m"'),
        ('"crypt-mode": "encrypt"', '"crypt-mode": "none", "crypt\\u002dmode": "encrypt"'),
        ('"signature": ', '"signature": null, "signature": '),
    ],
    ids=lambda change: change[1],
)
def test_a_member_that_is_there_twice_is_refused(change: tuple[str, str]) -> None:
    text = json.dumps(signed())
    assert change[0] in text
    with pytest.raises(DamageError, match="a member twice"):
        Manifest.parse(text.replace(*change).encode())


# --- what is covered


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in a document."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for name, part in inside for place in places(part, (*path, name)))]


COVERED = [place for place in places(document()) if place and place[0] not in ("unprotected", "signature")]


def verified(text: bytes) -> bool:
    """Whether a manifest is one, and signed under `KEY`."""
    try:
        return Manifest.parse(text).is_signed_by(KEY)
    except DamageError:
        return False


@pytest.mark.parametrize("place", COVERED, ids=str)
def test_no_member_that_is_covered_can_be_changed_removed_or_doubled(place: tuple[Any, ...]) -> None:
    replacements: list[Any] = ["", "none", "x", 0, 1, None, True, [], {}, "removed", "repeated"]
    for replacement in replacements:
        data = signed()
        at: Any = data
        for step in place[:-1]:
            at = at[step]
        before = at[place[-1]]
        if replacement == "removed":
            del at[place[-1]]
        elif replacement == "repeated":
            if isinstance(at, dict):
                continue
            at.append(before)
        elif type(before) is type(replacement) and before == replacement:
            continue
        else:
            at[place[-1]] = replacement
        assert not verified(json.dumps(data).encode()), replacement


def test_files_can_not_change_places() -> None:
    data = signed()
    data["files"].reverse()
    assert not matches(data)


@given(st.sampled_from(COVERED), st.text() | st.integers() | st.booleans() | st.none())
def test_a_covered_value_that_is_another_is_noticed(place: tuple[Any, ...], value: object) -> None:
    data = signed()
    at: Any = data
    for step in place[:-1]:
        at = at[step]
    assume(json.dumps(at[place[-1]]) != json.dumps(value))
    at[place[-1]] = value
    assert not verified(json.dumps(data).encode())


def check_every_bit(text: bytes, key: Key) -> None:
    """Flips each bit of a manifest that has nothing unprotected.

    Only where it still says the same may the signature match: white space that became other white space,
    and the case of the signature's digits.
    """
    whole = json.loads(text)
    assert Manifest.parse(text).is_signed_by(key)
    for bit in range(len(text) * 8):
        changed = bytearray(text)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            passes = Manifest.parse(bytes(changed)).is_signed_by(key)
        except DamageError:
            continue
        if passes:
            said = json.loads(bytes(changed))
            said["signature"] = said["signature"].lower()
            assert said == whole, (bit, bytes(changed))


def test_every_bit_that_flips_is_noticed() -> None:
    data = signed()
    del data["unprotected"]
    check_every_bit(json.dumps(data).encode(), KEY)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@given(JSON)
def test_what_is_unprotected_may_change_freely(value: object) -> None:
    data = signed()
    assert matches({**data, "unprotected": value})
    del data["unprotected"]
    assert matches(data)


# --- the signature itself


def test_no_other_text_in_its_place_is_a_signature() -> None:
    right = signed()["signature"]
    other = OTHER_KEY.sign(Manifest.parse(json.dumps(signed()).encode()).signed).hex()
    odd = ["", "0", right[:-1], right[:-2], right + "00", " " + right, "0" * 64, other, "\ud800", "é" * 64]
    for signature in [*odd, right[1:] + "\ud800", "0x" + right[2:]]:
        assert not matches({**signed(), "signature": signature})
    assert matches({**signed(), "signature": right.upper()})


@given(st.text())
def test_arbitrary_text_is_no_signature(text: str) -> None:
    assert not matches({**signed(), "signature": text})


def test_a_manifest_without_a_signature_is_signed_by_nobody() -> None:
    data = signed()
    assert not matches({**data, "signature": None})
    del data["signature"]
    assert not matches(data)


@pytest.mark.parametrize("value", [0, 1, True, [], {}, ["00"], 1.5])
def test_a_signature_of_another_kind_is_damage(value: object) -> None:
    with pytest.raises(DamageError, match="no valid signature"):
        matches({**signed(), "signature": value})


def test_whatever_hints_at_a_key_makes_a_manifest_one_that_needs_it() -> None:
    plain = document()
    plain["unprotected"] = {}
    for file in plain["files"]:
        file["crypt-mode"] = "none"
    assert not Manifest.parse(json.dumps(plain).encode()).needs_key
    one_mode = copy.deepcopy(plain)
    one_mode["files"][1]["crypt-mode"] = "sign-only"
    fingerprint = {**plain, "unprotected": {"key-fingerprint": KEY.fingerprint}}
    for data in (one_mode, fingerprint, {**plain, "signature": "00"}):
        assert Manifest.parse(json.dumps(data).encode()).needs_key
