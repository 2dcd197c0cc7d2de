"""Repository strings: those of the vendor's client, and no others."""

from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pbsfs.base.errors import UsageError
from pbsfs.sources.server.repository import Repository


@pytest.mark.parametrize(
    ("text", "user", "token", "host", "port", "store"),
    [
        ("mydatastore", "root@pam", None, "localhost", 8007, "mydatastore"),
        ("myhostname:mydatastore", "root@pam", None, "myhostname", 8007, "mydatastore"),
        ("user@pbs@myhostname:mydatastore", "user@pbs", None, "myhostname", 8007, "mydatastore"),
        ("user@pbs!token@host:store", "user@pbs", "token", "host", 8007, "store"),
        ("192.168.55.55:1234:mydatastore", "root@pam", None, "192.168.55.55", 1234, "mydatastore"),
        ("[ff80::51]:mydatastore", "root@pam", None, "ff80::51", 8007, "mydatastore"),
        ("[ff80::51]:1234:mydatastore", "root@pam", None, "ff80::51", 1234, "mydatastore"),
        ("backup@pbs!reader@[fd00::1]:8443:store1", "backup@pbs", "reader", "fd00::1", 8443, "store1"),
        ("jane@example.com@ldap@host:store", "jane@example.com@ldap", None, "host", 8007, "store"),
        ("a@b@c@pbs!t-1@host:store", "a@b@c@pbs", "t-1", "host", 8007, "store"),
        ("a!b@pbs@host:store", "a!b@pbs", None, "host", 8007, "store"),
        ("a!b@pbs!t@host:store", "a!b@pbs", "t", "host", 8007, "store"),
        ("jürgen@ad@host:store", "jürgen@ad", None, "host", 8007, "store"),
        ("u@pam@pbs.example.com.:65535:s_1.x-y", "u@pam", None, "pbs.example.com.", 65535, "s_1.x-y"),
        ("[fe80::1%eth0]:store", "root@pam", None, "fe80::1%eth0", 8007, "store"),
        ("8007:store", "root@pam", None, "8007", 8007, "store"),
        ("host:0080:store", "root@pam", None, "host", 80, "store"),
    ],
)
def test_a_repository_string_is_read_as_the_vendors_client_does(
    text: str, user: str, token: str | None, host: str, port: int, store: str
) -> None:
    assert Repository.parse(text) == Repository(user, token, host, port, store)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "no valid datastore"),
        (":", "no valid datastore"),
        ("host:", "no valid datastore"),
        ("host:-store", "no valid datastore"),
        ("host:a/b", "no valid datastore"),
        ("host:störe", "no valid datastore"),
        ("host:store\n", "no valid datastore"),
        ("user@pbs@host", "no valid datastore"),
        (":store", "is not a host"),
        ("user@pbs@:store", "is not a host"),
        ("user@pbs:store", "is not user@realm"),
        ("@host:store", "is not user@realm"),
        ("user@host:store", "is not user@realm"),
        ("us er@pbs@host:store", "is not user@realm"),
        ("us/er@pbs@host:store", "is not user@realm"),
        ("u\x7f@pbs@host:store", "is not user@realm"),
        ("@pbs@host:store", "is not user@realm"),
        ("user@@host:store", "is not user@realm"),
        ("user@pbs!@host:store", "is not a token's name"),
        ("user@pbs!a b@host:store", "is not a token's name"),
        ("user@pbs!a!b@host:store", "is not a token's name"),
        ("jürgen@ad!t@host:store", "plain ASCII"),
        ("ho st:store", "is not a host"),
        ("-host:store", "is not a host"),
        ("hőst:store", "is not a host"),
        ("host/x:store", "is not a host"),
        ("[ff80::51:store", "is not a host"),
        ("ff80::51:store", r"needs brackets; write \[ff80::51\]:store"),
        ("[]:store", "is not a host"),
        ("[x]:store", "is not a host"),
        ("[::1]x:store", "is not a host"),
        ("host:0:store", "is not a port"),
        ("host:65536:store", "is not a port"),
        ("host:-1:store", "is not a port"),
        ("host:+80:store", "is not a port"),
        ("host::store", "is not a port"),
        ("[::1]::store", "is not a port"),
        ("host:\uff18\uff10:store", "is not a port"),
        ("host:123456789012345678901234567890:store", "is not a port"),
    ],
)
def test_what_is_no_repository_is_refused_with_a_word_why(text: str, wrong: str) -> None:
    with pytest.raises(UsageError, match=wrong):
        Repository.parse(text)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("https://user@pbs@host:store", "write user@pbs@host:store"),
        ("https://host:8007", "write host:8007:DATASTORE"),
        ("https://host:8007/", "write host:8007:DATASTORE"),
        ("https://pbs.example.com", "write pbs.example.com:DATASTORE"),
        ("https://[fd00::1]", "write [fd00::1]:DATASTORE"),
        ("https://[fd00::1]:8007/#datastore", "write [fd00::1]:8007:DATASTORE"),
        ("https://", "they look like user@realm!token@host:8007:datastore"),
        ("fd00::1", "needs brackets; write [fd00::1]:DATASTORE"),
        ("u@pbs@fd00::1:store", "needs brackets; write u@pbs@[fd00::1]:store"),
    ],
)
def test_other_forms_are_answered_with_the_right_one(text: str, form: str) -> None:
    with pytest.raises(UsageError, match=re.escape(form)):
        Repository.parse(text)


def test_a_password_in_a_url_is_not_repeated() -> None:
    with pytest.raises(UsageError, match="belongs in PBS_PASSWORD") as caught:
        Repository.parse("https://u@pbs:hunter2@host:store")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ((None, None, None, "s"), "s"),
        ((None, "host", None, "s"), "host:s"),
        (("u@pbs!t", "host", 1234, "s"), "u@pbs!t@host:1234:s"),
        ((None, "fd00::1", 1234, "s"), "[fd00::1]:1234:s"),
        ((None, "[fd00::1]", None, "s"), "[fd00::1]:s"),
        ((None, "fe80::1%eth0", None, "s"), "[fe80::1%eth0]:s"),
    ],
)
def test_parts_make_the_same_repository(
    parts: tuple[str | None, str | None, int | None, str], text: str
) -> None:
    assert Repository.of_parts(*parts) == Repository.parse(text)


@pytest.mark.parametrize(
    ("parts", "wrong"),
    [
        (("u", "host", None, "s"), "^'u' is not user@realm"),
        (("u v@pbs!t", "host", None, "s"), "^'u v@pbs' is not user@realm"),
        ((None, "host", None, "a/b"), "'a/b' is not the name of a datastore"),
        ((None, "host:8007", None, "s"), "give its port with --port or PBS_PORT"),
        ((None, "[::1]:8007", None, "s"), "give its port with --port or PBS_PORT"),
        ((None, "https://host", None, "s"), "is not a server's name or address"),
        ((None, "ho st", None, "s"), "is not a host"),
    ],
)
def test_a_part_that_is_wrong_is_named(
    parts: tuple[str | None, str | None, int | None, str], wrong: str
) -> None:
    with pytest.raises(UsageError, match=wrong):
        Repository.of_parts(*parts)


@given(
    st.one_of(
        st.text(max_size=40),
        st.text(st.sampled_from("ab1@!:[].%-/ é\n"), max_size=24),
        st.builds(
            "".join,
            st.lists(
                st.sampled_from(["u", "@", "pbs", "!", "t", "host", ":", "8007", "[::1]", "store", "é"]),
                max_size=12,
            ),
        ),
    )
)
@example("a!b@pbs!t@[::1]:8007:store")
@example("x@@@y:z")
def test_whatever_is_taken_reads_the_same_after_it_was_written_out(text: str) -> None:
    with contextlib.suppress(UsageError):
        repository = Repository.parse(text)
        assert Repository.parse(str(repository)) == repository
        assert repository.user in text or repository.user == "root@pam"
        assert 0 < repository.port < 65536
        assert repository.auth_id.startswith(repository.user)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("u@pam@host:18007", "u@pam@host:18007:DATASTORE"),
        ("u@pbs!t@[::1]:8008", "u@pbs!t@[::1]:8008:DATASTORE"),
        ("host:1", "root@pam@host:1:DATASTORE"),
        ("host:store", None),
        ("host:8s", None),
        ("host:65536", None),
        ("host:123456789", None),
        ("host:1234:18007", None),
    ],
)
def test_a_datastore_that_may_be_a_port_is_hinted_at(text: str, meant: str | None) -> None:
    expected = "" if meant is None else f"; if {text.rpartition(':')[2]} is the port, write {meant}"
    assert Repository.parse(text).port_hint == expected


@pytest.mark.parametrize("text", ["\0" * 65536, "a" * 65536, "u:hunter2@host:" + "a" * 513])
def test_what_is_far_too_long_is_refused_and_not_shown(text: str) -> None:
    with pytest.raises(
        UsageError, match=f"has {len(text)} characters; valid ones have at most 512"
    ) as caught:
        Repository.parse(text)
    assert len(str(caught.value)) < 200
    assert "hunter2" not in str(caught.value)
    for parts in (("u@pbs", "host", text), ("u@pbs", text, "store"), (text, "host", "store")):
        with pytest.raises(UsageError, match="valid ones have at most 512"):
            Repository.of_parts(parts[0], parts[1], None, parts[2])


def test_an_error_shows_the_beginning_of_a_wrong_repository() -> None:
    with pytest.raises(UsageError) as caught:
        Repository.parse("\x1b" * 500)
    assert str(caught.value).startswith("'\\x1b\\x1b")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_a_repository_tells_who_logs_in_where() -> None:
    token = Repository.parse("jane@example.com@ldap!t@[fd00::1]:1234:store")
    assert token.auth_id == "jane@example.com@ldap!t"
    assert token.realm == "ldap"
    assert token.address == "[fd00::1]:1234"
    assert str(token) == "jane@example.com@ldap!t@[fd00::1]:1234:store"

    short = Repository.parse("store")
    assert (short.auth_id, short.realm, short.address) == ("root@pam", "pam", "localhost:8007")
    assert str(short) == "root@pam@localhost:8007:store"
