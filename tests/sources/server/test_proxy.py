"""Proxies: which one the environment names, as curl has it, and each way in which one may refuse."""

from __future__ import annotations

import logging
import socket

import pytest
import trio

from pbsfs.access.options import SourceOptions
from pbsfs.access.resolve import find_access
from pbsfs.access.terminal import Terminal
from pbsfs.base.errors import (
    AuthError,
    ConnectError,
    ForbiddenError,
    ResolveError,
    SourceError,
    TrustError,
    UsageError,
    WrongServerError,
)
from pbsfs.base.secret import Secret
from pbsfs.sources.http.proxy import Proxy, find_proxy, is_excepted
from pbsfs.sources.http.tls import Trust, connect, parse_fingerprint, peek_fingerprint
from pbsfs.sources.server.limits import ServerLimits
from pbsfs.sources.server.repository import Repository
from pbsfs.sources.server.source import ServerSettings, ServerSource
from tests.sources.server.peers import Peer, request_of, to_the_end
from tests.sources.server.serving import CONTENT, SECRET, TOKEN, image_of, read_all, reading
from tests.support.proxy import NAME, ConnectProxy
from tests.support.server import ReferenceServer, certificate

SERVER = Repository.parse("pbs.example.com:store")
PROXY_PASSWORD = "s3cr:t/@ü"
QUOTED = "s3cr%3At%2F%40%C3%BC"


def found(host: str = "pbs.example.com", **environment: str) -> Proxy | None:
    return find_proxy(Repository("root@pam", None, host, 8007, "store"), environment)


# --- which one


def test_without_a_variable_there_is_none() -> None:
    assert found() is None
    assert found(HTTPS_PROXY="", http_proxy="http://p:1", HTTP_PROXY="http://p:1", NO_PROXY="x") is None


def test_the_variables_count_in_the_order_of_curl() -> None:
    variables = {"ALL_PROXY": "http://d:1", "all_proxy": "http://c:1", "HTTPS_PROXY": "http://b:1"}
    variables["https_proxy"] = "http://a:1"
    while variables:
        chosen = found(**variables)
        assert chosen is not None
        last = list(variables)[-1]
        assert (f"http://{chosen.address}", chosen.variable) == (variables.pop(last), last)


@pytest.mark.parametrize(
    ("text", "host", "port", "user", "password"),
    [
        ("http://proxy.example.com:3128", "proxy.example.com", 3128, None, None),
        ("http://proxy.example.com:3128/", "proxy.example.com", 3128, None, None),
        ("HTTP://proxy", "proxy", 1080, None, None),
        ("proxy.example.com", "proxy.example.com", 1080, None, None),
        (" 192.0.2.1:8080\n", "192.0.2.1", 8080, None, None),
        ("http://[2001:db8::1]:3128", "2001:db8::1", 3128, None, None),
        (f"http://me:{QUOTED}@proxy:3128", "proxy", 3128, "me", PROXY_PASSWORD),
        ("me%40corp:a@proxy", "proxy", 1080, "me@corp", "a"),
        ("http://me@proxy", "proxy", 1080, "me", ""),
    ],
)
def test_an_address_is_read_as_curl_reads_it(
    text: str, host: str, port: int, user: str | None, password: str | None
) -> None:
    chosen = found(HTTPS_PROXY=text)
    assert chosen is not None
    assert (chosen.host, chosen.port, chosen.user) == (host, port, user)
    assert (None if chosen.password is None else chosen.password.reveal()) == password


def test_the_password_does_not_show_itself() -> None:
    chosen = found(HTTPS_PROXY=f"http://me:{QUOTED}@proxy:3128")
    assert "s3cr" not in repr(chosen)
    assert chosen is not None
    assert chosen.address == "proxy:3128"


@pytest.mark.parametrize("scheme", ["https", "socks4", "socks4a", "socks5", "socks5h", "SOCKS5"])
def test_other_kinds_of_proxies_are_refused_in_one_line(scheme: str) -> None:
    with pytest.raises(
        UsageError, match=f"ALL_PROXY: {scheme.lower()}:// proxies are not supported"
    ) as caught:
        found(ALL_PROXY=f"{scheme}://me:s3cret@proxy:1080")
    assert "only http:// ones" in str(caught.value)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "http://",
        "http://me:s3cret@",
        "http://me:s3cret@:3128",
        "http://me:s3cret@proxy:x",
        "http://p:99999",
        "me:s3cret@proxy:0",
        "ftp://me:s3cret@proxy",
        "http://me:s3cret@a b",
        "http://[me:s3cret@x",
        "me:s3#c@p",
    ],
)
def test_what_is_no_address_is_refused_and_not_shown(text: str) -> None:
    with pytest.raises(UsageError, match="https_proxy: not the address of a proxy; it looks like") as caught:
        found(https_proxy=text)
    assert "s3c" not in str(caught.value)


@pytest.mark.parametrize(
    ("exceptions", "host", "excepted"),
    [
        ("*", "pbs.example.com", True),
        (" * ", "192.0.2.1", True),
        ("example.com", "example.com", True),
        ("example.com", "pbs.example.com", True),
        (".example.com", "pbs.example.com", True),
        (".example.com", "example.com", True),
        ("EXAMPLE.com.", "pbs.Example.COM", True),
        ("example.com", "pbs.example.com.", True),
        ("ample.com", "pbs.example.com", False),
        ("pbs.example.com", "example.com", False),
        ("a.org,,example.com", "pbs.example.com", True),
        ("a.org example.com", "pbs.example.com", True),
        ("a.org , example.com", "pbs.example.com", True),
        ("a.org", "pbs.example.com", False),
        (".", "pbs.example.com", False),
        ("*.example.com", "pbs.example.com", False),
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.10", False),
        ("192.0.2.0/24", "192.0.2.77", True),
        ("192.0.2.77/24", "192.0.2.1", True),
        ("192.0.2.0/24", "192.0.3.1", False),
        ("192.0.2.0/33", "192.0.2.1", False),
        ("0.2.1", "192.0.2.1", False),
        ("2001:db8::1", "2001:db8:0::1", True),
        ("[2001:db8::1]", "2001:db8::1", True),
        ("2001:db8::/32", "2001:db8:5::1", True),
        ("fe80::1", "fe80::1%eth0", True),
        ("2001:db8::/32", "192.0.2.1", False),
    ],
)
def test_exceptions_are_those_of_curl(exceptions: str, host: str, excepted: bool) -> None:
    assert is_excepted(host, exceptions) is excepted
    for name in ("no_proxy", "NO_PROXY"):
        assert (found(host, HTTPS_PROXY="http://p:1", **{name: exceptions}) is None) is excepted


def test_lower_case_exceptions_come_first() -> None:
    assert found(all_proxy="p", no_proxy="a.org", NO_PROXY="*") is not None


# --- through one


def via(port: int, user: str | None = None, password: str | None = None, host: str = "127.0.0.1") -> Proxy:
    return Proxy(host, port, "HTTPS_PROXY", user, None if password is None else Secret(password))


def through(server: ReferenceServer, proxy: Proxy, host: str = NAME) -> ServerSource:
    return ServerSource(
        Repository.parse(server.repository(TOKEN, host=host)),
        Secret(SECRET),
        Trust(pinned=parse_fingerprint(server.fingerprint)),
        ServerSettings(retry_timeout=0, connections=2),
        proxy,
    )


def test_lists_and_images_come_through_the_proxy_which_knows_the_servers_name(
    server: ReferenceServer,
) -> None:
    async def main() -> None:
        async with reading(through(server, via(proxy.port))) as reader:
            assert await read_all(await image_of(reader)) == CONTENT

    with ConnectProxy() as proxy:
        trio.run(main)
        assert set(proxy.targets) == {f"{NAME}:{server.port}"}
        assert len(proxy.targets) == server.connections >= 2
        assert all(b"authorization" not in head.lower() for head in proxy.heads)


def test_user_and_password_are_given_to_the_proxy_and_to_nobody_else(
    server: ReferenceServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)

    async def main() -> None:
        async with reading(through(server, via(proxy.port, "me", PROXY_PASSWORD))) as reader:
            assert await read_all(await image_of(reader)) == CONTENT

    with ConnectProxy(user="me", password=PROXY_PASSWORD) as proxy:
        trio.run(main)
        assert len(proxy.targets) >= 2
    assert "s3cr" not in caplog.text


def test_the_servers_certificate_is_checked_through_the_proxy() -> None:
    made = certificate.make()
    with Peer(made) as peer, ConnectProxy() as proxy:
        right = Trust(pinned=parse_fingerprint(made.fingerprint))
        connect(peer.repository(NAME), right, via(proxy.port)).socket.close()
        for trust in (Trust(), Trust(pinned="ab" * 32), Trust(known="ab" * 32)):
            with pytest.raises(TrustError):
                connect(peer.repository(NAME), trust, via(proxy.port))
        assert peek_fingerprint(peer.repository(NAME), via(proxy.port)) == right.pinned
        assert set(proxy.targets) == {f"{NAME}:{peer.port}"}
        assert len(proxy.targets) == peer.connections
        assert set(peer.received) == {b""}


class Somebody(Terminal):
    """Accepts what is shown."""

    def __init__(self) -> None:
        self.asked = ""

    def password(self, text: str) -> Secret:
        raise AssertionError(text)

    def confirm(self, text: str) -> bool:
        self.asked = text
        return True


def test_a_new_servers_fingerprint_is_looked_at_through_the_proxy(
    tmp_path: object, server: ReferenceServer
) -> None:
    with ConnectProxy() as proxy:
        repository = server.repository(TOKEN, host=NAME)
        environment = {
            "PBS_PASSWORD": "x",
            "XDG_CONFIG_HOME": str(tmp_path),
            "https_proxy": f"http://127.0.0.1:{proxy.port}",
        }
        somebody = Somebody()
        access = find_access(SourceOptions(repository), environment, somebody)
        assert len(proxy.targets) == server.connections
    assert server.fingerprint.lower() in somebody.asked.lower()
    assert access.trust.known == parse_fingerprint(server.fingerprint)
    assert access.proxy is not None
    assert access.proxy.port == proxy.port


# --- what may be wrong with one

SAYINGS = [
    (
        b"HTTP/1.1 407 Auth\r\n\r\n",
        AuthError,
        False,
        r"asks for a user and password \(status 407 Auth\); give",
    ),
    (
        b"HTTP/1.0 403 \x1b[31mNo\r\nX: y\r\n\r\nwords",
        ForbiddenError,
        False,
        r"refuses .* \(status 403 \[31mNo\)",
    ),
    (
        b"HTTP/1.1 502 Bad Gateway\r\n\r\n",
        ConnectError,
        True,
        r"can't reach pbs.*:8007 \(status 502 Bad Gateway\)",
    ),
    (b"HTTP/1.1 503\r\n\r\n", ConnectError, True, r"\(status 503\)"),
    (
        b"HTTP/1.1 405 Not Allowed\n\n",
        WrongServerError,
        False,
        r"opens no tunnel .*405 Not Allowed\); check HTTPS_PROXY",
    ),
    (b"HTTP/1.1 501 What\r\n\r\n", WrongServerError, False, "opens no tunnel"),
    (b"HTTP/1.1 301 There\r\n\r\n", WrongServerError, False, "opens no tunnel"),
    (
        b"SSH-2.0-OpenSSH_9.2p1\r\n",
        WrongServerError,
        False,
        "does not answer as an HTTP proxy does; check HTTPS_PROXY",
    ),
    (b"\x05\xff", WrongServerError, False, "does not answer as an HTTP proxy"),
    (b"HTTP/1.1 2000 OK\r\n\r\n", WrongServerError, False, "does not answer as an HTTP proxy"),
    (b"HTTP/1.1 200 OK\r\n\r\nmore", WrongServerError, False, "does not answer as an HTTP proxy"),
    (b"HTTP/1.1 200 OK\r\n" + b"x" * (70 << 10), WrongServerError, False, "does not answer as an HTTP proxy"),
    (b"HTTP/1.1 200 OK\r\n", ConnectError, True, "closed the connection"),
    (b"", ConnectError, True, "closed the connection"),
]


@pytest.mark.parametrize(("answer", "kind", "retryable", "words"), SAYINGS)
def test_each_way_in_which_a_proxy_refuses_has_its_line(
    answer: bytes, kind: type[SourceError], retryable: bool, words: str
) -> None:
    def talk(connection: socket.socket) -> None:
        request_of(connection)
        connection.sendall(answer)
        connection.shutdown(socket.SHUT_WR)
        to_the_end(connection)

    with Peer(talk=talk) as peer, pytest.raises(SourceError, match=words) as caught:
        connect(SERVER, Trust(), via(peer.port))
    assert (type(caught.value), caught.value.retryable) == (kind, retryable)
    assert f"127.0.0.1:{peer.port}" in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_wrong_password_says_so_and_does_not_show_it() -> None:
    with ConnectProxy(user="me", password="other") as proxy, pytest.raises(AuthError) as caught:
        connect(SERVER, Trust(), via(proxy.port, "me", PROXY_PASSWORD))
    assert "does not accept the user and password (status 407 Proxy Authentication Required)" in str(
        caught.value
    )
    assert "http://USER:PASSWORD@HOST:PORT" in str(caught.value)
    assert "s3cr" not in str(caught.value)


def test_a_proxy_that_is_not_there_says_so() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        expected = f"cannot connect to the proxy 127.0.0.1:{port}: Connection refused; check HTTPS_PROXY"
        with pytest.raises(ConnectError, match=expected):
            connect(SERVER, Trust(), via(port))


def test_a_proxy_whose_name_does_not_resolve_says_so() -> None:
    with pytest.raises(
        ResolveError, match=r"the proxy's name 'a\.\.b' does not resolve: .*; check HTTPS_PROXY"
    ):
        connect(SERVER, Trust(), via(3128, host="a..b"))


def test_a_proxy_that_says_nothing_is_given_up() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(ConnectError, match=r"the proxy 127\.0\.0\.1:\d+: no answer within") as caught,
    ):
        connect(SERVER, Trust(), via(silent.getsockname()[1]), ServerLimits(tunnel_timeout=0.05))
    assert caught.value.retryable
