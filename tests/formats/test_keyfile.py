"""Key files: the vendor's unlock to the vendor's keys, hostile ones cost nothing, none shows its key."""

from __future__ import annotations

import hashlib
import json
import re
from base64 import b64decode, b64encode
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbsfs.base.errors import DamageError, PasswordError
from pbsfs.formats import keyfile
from pbsfs.formats.keyfile import MAX_KEY_FILE_SIZE, KeyFile
from tests.support import byhand, golden
from tests.support.keyfiles import HINT, KINDS, PASSWORD, document, key_file
from tests.support.made import KEY, OTHER_KEY

GOLDEN_PASSWORD = "correct-horse"
FINGERPRINT = KEY.fingerprint

PROTECTED = ("scrypt", "pbkdf2")
each_kind = pytest.mark.parametrize("kind", KINDS)
each_protected = pytest.mark.parametrize("kind", PROTECTED)


def parse(data: object) -> KeyFile:
    return KeyFile.parse(json.dumps(data).encode())


def refusal(data: object) -> str:
    """Why a key file is refused as it is read, before any password is asked for."""
    with pytest.raises(DamageError) as caught:
        parse(data)
    return str(caught.value)


@pytest.fixture
def deriving_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be derived: what is to be refused at once must not cost time or memory first."""

    def derive(*_args: object, **_more: object) -> bytes:
        raise AssertionError("a key was derived")

    monkeypatch.setattr(hashlib, "scrypt", derive)
    monkeypatch.setattr(hashlib, "pbkdf2_hmac", derive)


# --- the vendor's


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "kind"), [("plain", "none"), ("other", "none"), ("scrypt", "scrypt"), ("pbkdf2", "pbkdf2")]
)
def test_the_vendors_key_files_unlock_to_the_key_that_they_name(name: str, kind: str) -> None:
    text = (golden.ROOT / "keys" / f"{name}.json").read_bytes()
    stored = json.loads(text)
    file = KeyFile.parse(text)

    assert file.protection == kind
    assert (file.created, file.modified) == (stored["created"], stored["modified"])
    assert (file.fingerprint, file.hint) == (stored["fingerprint"], stored.get("hint"))
    password = None if kind == "none" else GOLDEN_PASSWORD.encode()
    assert file.unlock(password).fingerprint == stored["fingerprint"]


@pytest.mark.golden
def test_a_wrong_password_of_the_vendors_key_shows_the_vendors_hint() -> None:
    file = KeyFile.parse((golden.ROOT / "keys" / "scrypt.json").read_bytes())
    with pytest.raises(PasswordError, match=r"^wrong password \(hint: the usual horse\)$"):
        file.unlock(b"correct-donkey")


# --- made ones


@each_kind
def test_what_was_locked_unlocks(kind: str) -> None:
    file = parse(document(kind, fingerprint=FINGERPRINT))

    assert file.protection == kind
    assert file.unlock(PASSWORD.encode()).reveal() == KEY.reveal()
    assert (file.fingerprint, file.hint) == (FINGERPRINT, HINT)


def test_a_key_without_a_password_needs_none_and_does_not_mind_one() -> None:
    file = parse(document("none"))
    assert file.unlock().reveal() == file.unlock(b"any").reveal() == KEY.reveal()


@each_kind
def test_what_is_optional_may_be_absent_or_null(kind: str) -> None:
    whole = document(kind)
    for name in ("created", "modified", "fingerprint", "hint"):
        whole.pop(name, None)
    for data in (whole, {**whole, "created": None, "fingerprint": None, "hint": None}):
        file = parse(data)
        assert (file.created, file.modified, file.fingerprint, file.hint) == (None,) * 4
        assert file.unlock(PASSWORD.encode()).fingerprint == FINGERPRINT


def test_members_that_are_not_known_change_nothing() -> None:
    assert parse(document("scrypt", colour={"is": ["blue"]})) == parse(document("scrypt"))


# --- passwords


@each_protected
@pytest.mark.parametrize("password", ["", PASSWORD + " ", PASSWORD[:-1], PASSWORD.upper()])
def test_a_wrong_password_is_told_with_the_hint(kind: str, password: str) -> None:
    with pytest.raises(PasswordError) as caught:
        parse(document(kind)).unlock(password.encode())
    assert str(caught.value) == f"wrong password (hint: {HINT})"
    assert caught.value.__suppress_context__


@each_protected
def test_a_wrong_password_without_a_hint_is_told_plainly(kind: str) -> None:
    for hint in (None, ""):
        with pytest.raises(PasswordError, match=r"^wrong password$"):
            parse(document(kind, hint=hint)).unlock(b"wrong")


@each_protected
@pytest.mark.usefixtures("deriving_fails")
def test_a_missing_password_is_told_as_such(kind: str) -> None:
    with pytest.raises(PasswordError, match="it needs a password"):
        parse(document(kind)).unlock()


@each_protected
def test_every_bit_of_a_locked_key_that_flips_is_noticed(kind: str) -> None:
    whole = b64decode(document(kind)["data"])
    for bit in range(len(whole) * 8):
        data = b64encode(byhand.flipped(whole, bit)).decode()
        with pytest.raises(PasswordError, match="wrong password"):
            parse(document(kind, data=data)).unlock(PASSWORD.encode())


def test_a_hint_and_dates_hold_nothing_that_a_terminal_would_obey() -> None:
    odd = "a\x1b[2Jb\r\nc\ud800d\u202ee\N{EURO SIGN}"
    file = parse(document("scrypt", hint=odd, created=odd, modified=odd, fingerprint=odd))
    for text in (file.hint, file.created, file.modified, file.fingerprint):
        assert text == "a\ufffd[2Jb\ufffd\ufffdc\ufffdd\ufffde\N{EURO SIGN}"
    with pytest.raises(PasswordError) as caught:
        file.unlock(b"wrong")
    assert str(caught.value).isprintable()


# --- fingerprints


@each_kind
def test_a_key_that_is_not_the_one_that_the_file_names_is_damage(kind: str) -> None:
    for wrong in (OTHER_KEY.fingerprint, FINGERPRINT[:-1], "", "é"):
        with pytest.raises(DamageError) as caught:
            parse(document(kind, fingerprint=wrong)).unlock(PASSWORD.encode())
        assert str(caught.value) == f"the key in it has the fingerprint {FINGERPRINT}, not {wrong}"


def test_the_case_of_a_fingerprint_does_not_matter() -> None:
    assert parse(document(fingerprint=FINGERPRINT.upper())).unlock().fingerprint == FINGERPRINT


def test_a_bit_of_an_unlocked_key_that_flips_is_noticed_by_its_fingerprint() -> None:
    for bit in range(256):
        data = b64encode(byhand.flipped(KEY.reveal(), bit)).decode()
        with pytest.raises(DamageError, match="the key in it has the fingerprint"):
            parse(document(fingerprint=FINGERPRINT, data=data)).unlock()


# --- hostile ones


def scrypt(**changes: Any) -> dict[str, Any]:
    values = {"n": 65536, "r": 8, "p": 1, "salt": b64encode(b"salt").decode()} | changes
    return document("scrypt", kdf={"Scrypt": values})


def pbkdf2(**changes: Any) -> dict[str, Any]:
    values = {"iter": 65535, "salt": b64encode(b"salt").decode()} | changes
    return document("pbkdf2", kdf={"PBKDF2": values})


ODD_NUMBERS: list[object] = [None, 0, -1, True, 1.5, "16", [], {}, 1 << 41, 1 << 200]


@pytest.mark.usefixtures("deriving_fails")
@pytest.mark.parametrize(
    "changes",
    [
        {"n": 1 << 20, "r": 8},  # 1 GiB
        {"n": 1 << 16, "r": 128},
        {"n": 2, "r": 1 << 24},
        {"n": 2, "r": 8, "p": 1 << 20},  # p counts too: 1 GiB
        {"n": 1 << 40},
        {"r": 1 << 40},
        {"p": 1 << 40},
        {"n": 1 << 18, "r": 8, "p": 32},  # time
        {"n": 65537},
        {"n": 3},
        {"n": 1},
        {"n": 65536, "r": 1},  # RFC 7914: n < 2^(16·r)
    ],
    ids=str,
)
def test_scrypt_that_would_take_much_or_is_none_is_refused_at_once(changes: dict[str, int]) -> None:
    assert "cost too much or are invalid" in refusal(scrypt(**changes))


@pytest.mark.parametrize(
    ("n", "r", "p"), [(65536, 8, 1), (1 << 15, 1, 1), (2, 1, 1), (2, 8, 1000), (2, 1, 1 << 14), (16, 64, 16)]
)
def test_scrypt_that_is_accepted_can_be_derived(n: int, r: int, p: int) -> None:
    with pytest.raises(PasswordError, match="wrong password"):
        parse(scrypt(n=n, r=r, p=p)).unlock(PASSWORD.encode())


@given(st.integers(0, 12), st.integers(1, 40), st.integers(1, 300))
def test_no_accepted_parameters_fail_otherwise_than_by_password(log_n: int, r: int, p: int) -> None:
    try:
        file = parse(scrypt(n=1 << log_n, r=r, p=max(1, min(p, (1 << 14) // ((1 << log_n) * r)))))
    except DamageError:
        assert log_n == 0
        return
    with pytest.raises(PasswordError, match="wrong password"):
        file.unlock(PASSWORD.encode())


@pytest.mark.usefixtures("deriving_fails")
@pytest.mark.parametrize("member", ["n", "r", "p"])
def test_scrypt_needs_its_numbers(member: str) -> None:
    for value in ODD_NUMBERS:
        assert f"no valid '{member}'" in refusal(scrypt(**{member: value}))
    missing = scrypt()
    del missing["kdf"]["Scrypt"][member]
    assert f"no valid '{member}'" in refusal(missing)


@pytest.mark.usefixtures("deriving_fails")
def test_rounds_of_pbkdf2_are_bounded() -> None:
    parse(pbkdf2(iter=keyfile.MAX_ITERATIONS))
    assert "are too many" in refusal(pbkdf2(iter=keyfile.MAX_ITERATIONS + 1))
    for value in ODD_NUMBERS:
        assert "no valid 'iter'" in refusal(pbkdf2(iter=value))


@pytest.mark.usefixtures("deriving_fails")
@pytest.mark.parametrize("make", [scrypt, pbkdf2])
def test_a_salt_has_to_be_base64(make: Any) -> None:
    for salt in (None, 1, "*", "ab", "abc=d", "é", "YQ==\n", ["YQ=="]):
        assert "no valid 'salt'" in refusal(make(salt=salt))


@pytest.mark.parametrize(
    "kdf",
    [
        True,
        0,
        "",
        "Scrypt",
        [],
        ["Scrypt"],
        {},
        {"Argon2": {}},
        {"scrypt": {"n": 2, "r": 1, "p": 1, "salt": ""}},
        {"Scrypt": None},
        {"Scrypt": []},
        {"PBKDF2": "x"},
        {"Scrypt": {"n": 2, "r": 1, "p": 1, "salt": ""}, "PBKDF2": {"iter": 1, "salt": ""}},
    ],
    ids=str,
)
def test_a_protection_that_is_not_known_is_refused(kdf: object) -> None:
    assert "its kind of password protection is unknown" in refusal(document("scrypt", kdf=kdf))


@each_kind
def test_data_of_another_length_is_refused(kind: str) -> None:
    right = 32 if kind == "none" else 64
    for length in (0, 1, 16, 31, 33, 32 if kind != "none" else 64, 63, 65, 1000):
        told = refusal(document(kind, data=b64encode(bytes(length)).decode()))
        assert told == f"its 'data' has {length} bytes, not {right}"


@each_kind
def test_data_that_is_not_base64_is_refused(kind: str) -> None:
    whole = document(kind)["data"]
    odd: list[object] = [None, 1, []]
    for data in (*odd, "*" * 44, whole[:-1], whole + "\n", whole.replace("A", "-"), "é" + whole[1:]):
        assert "no valid 'data'" in refusal(document(kind, data=data))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe\xfd", "not JSON"),
        (b"-----BEGIN PRIVATE KEY-----", "a PEM file"),
        (b"[" * 60_000, "not JSON"),
        (b'{"kdf":' + b"9" * 5000 + b"}", "not JSON"),
        (b"null", "no 'kdf'"),
        (b"[]", "no 'kdf'"),
        (b'"kdf"', "no 'kdf'"),
        (b'{"data":""}', "no 'kdf'"),
        (b" " * MAX_KEY_FILE_SIZE + b"{}", "too long"),
    ],
    ids=lambda value: value[:20],
)
def test_what_is_no_key_file_is_refused(text: bytes, reason: str) -> None:
    with pytest.raises(DamageError, match=reason):
        KeyFile.parse(text)


# --- anything at all

JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(),
        st.binary(max_size=70).map(lambda data: b64encode(data).decode()),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(st.text(), st.sampled_from(["Scrypt", "PBKDF2", "n", "r", "p", "salt", "iter"])),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)


@given(JSON)
def test_arbitrary_json_raises_nothing_but_damage(data: object) -> None:
    with pytest.raises(DamageError):
        parse(data)


@given(st.sampled_from(KINDS), st.dictionaries(st.sampled_from(sorted(document("scrypt"))), JSON, min_size=1))
def test_arbitrary_members_raise_nothing_but_damage(kind: str, members: dict[str, object]) -> None:
    try:
        file = parse({**document(kind), **members})
    except DamageError:
        return
    for text in (file.created, file.modified, file.fingerprint, file.hint):
        assert text is None or text.isprintable()


@given(st.binary())
def test_arbitrary_bytes_raise_nothing_but_damage(text: bytes) -> None:
    with pytest.raises(DamageError):
        KeyFile.parse(text)


# --- secrecy


@each_kind
def test_repr_and_errors_show_no_key_material(kind: str) -> None:
    file = parse(document(kind, fingerprint=OTHER_KEY.fingerprint))
    shown = f"{file!r} {file}"
    with pytest.raises(DamageError) as caught:
        file.unlock(PASSWORD.encode())
    shown += f"{caught.value!r} {refusal(document(kind, data='AAAA'))}"
    assert HINT in shown  # so this is where it would be
    stored = document(kind)["data"]
    for secret in (KEY.reveal(), b64decode(stored)):
        for form in (secret.hex(), b64encode(secret).decode(), repr(secret)[2:-1]):
            assert form[:12] not in shown
    assert not re.search(r"[0-9a-f]{16}", shown)


def test_a_key_file_survives_a_round_of_json() -> None:
    assert KeyFile.parse(key_file("pbkdf2")) == parse(document("pbkdf2"))
