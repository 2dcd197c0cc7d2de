"""Trust: a server is verified before it is told anything, and each reason to refuse it is clear."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbsfs.base.errors import ConnectError, ResolveError, TrustError, UsageError, WrongServerError
from pbsfs.sources.http import tls
from pbsfs.sources.http.proxy import Proxy
from pbsfs.sources.http.tls import (
    Trust,
    connect,
    parse_fingerprint,
    peek_fingerprint,
    show_fingerprint,
)
from pbsfs.sources.server.limits import ServerLimits
from pbsfs.sources.server.repository import Repository
from tests.sources.server.peers import Peer, reset
from tests.support.server import certificate
from tests.support.server.certificate import Certificate

OTHER = "ab" * 32
SHOWN_OTHER = ":".join(["ab"] * 32)


@pytest.fixture(scope="module")
def self_signed() -> Certificate:
    return certificate.make()


@pytest.fixture(scope="module")
def signed() -> Certificate:
    """A certificate for `localhost` that a CA has signed."""
    return certificate.make(ca_signed=True)


@pytest.fixture
def ca(signed: Certificate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system trusts the CA that signed `signed`."""
    assert signed.ca is not None
    (tmp_path / "ca.pem").write_text(signed.ca)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))


@pytest.fixture(autouse=True)
def no_other_cas(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))


def fingerprint_of(found: Certificate) -> str:
    return parse_fingerprint(found.fingerprint)


def accepts(peer: Peer, trust: Trust, host: str = "127.0.0.1") -> None:
    """The peer is trusted, and gets what is sent then."""
    connection = connect(peer.repository(host), trust)
    with connection.socket as sock:
        assert sock.version() in ("TLSv1.2", "TLSv1.3")
        assert 0 < connection.round_trip < 10
        sock.sendall(b"hello")


def refuses(peer: Peer, trust: Trust, host: str = "127.0.0.1") -> str:
    """The peer is not trusted: why."""
    with pytest.raises(TrustError) as caught:
        connect(peer.repository(host), trust)
    assert not caught.value.retryable
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- fingerprints


@pytest.mark.parametrize(
    "text",
    [
        *(OTHER, SHOWN_OTHER, SHOWN_OTHER.upper(), f"  {SHOWN_OTHER}\n", "AB:" * 31 + "ab", OTHER.upper()),
        f"sha256 Fingerprint={SHOWN_OTHER.upper()}\n",  # openssl 3
        f"SHA256 Fingerprint={SHOWN_OTHER}",  # openssl 1
        f"SHA256:{OTHER}",
        f"sha-256: {SHOWN_OTHER}",
    ],
)
def test_a_fingerprint_is_read_whatever_its_case_and_colons(text: str) -> None:
    assert parse_fingerprint(text) == OTHER
    assert show_fingerprint(parse_fingerprint(text)) == SHOWN_OTHER


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ab",
        OTHER + "ab",
        OTHER[1:],
        "xy" * 32,
        "ab " * 32,
        "sha1:" + OTHER,
        "sha256" + OTHER,
        "SHA256:" + "A" * 43,
    ],
)
def test_what_is_no_fingerprint_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a fingerprint"):
        parse_fingerprint(text)


@given(st.binary(min_size=32, max_size=32))
def test_a_fingerprint_is_shown_as_it_is_read(digest: bytes) -> None:
    assert show_fingerprint(digest.hex()) == digest.hex(":")
    assert parse_fingerprint(digest.hex(":")) == digest.hex()


# --- who is trusted


def test_a_server_with_the_right_fingerprint_is_trusted(self_signed: Certificate) -> None:
    for trust in (Trust(pinned=fingerprint_of(self_signed)), Trust(known=fingerprint_of(self_signed))):
        with Peer(self_signed) as peer:
            accepts(peer, trust)
        assert peer.received == [b"hello"]


def test_with_the_right_fingerprint_the_name_does_not_matter(signed: Certificate) -> None:
    with Peer(signed) as peer:
        accepts(peer, Trust(pinned=fingerprint_of(signed)))


def test_a_wrong_fingerprint_shows_both_and_how_to_accept_and_tells_the_server_nothing(
    self_signed: Certificate,
) -> None:
    for trust in (Trust(pinned=OTHER), Trust(known=OTHER)):
        with Peer(self_signed) as peer:
            text = refuses(peer, trust)
        assert f"Expected fingerprint: {SHOWN_OTHER}; found: {self_signed.fingerprint}." in text
        assert "accept it with --fingerprint or PBS_FINGERPRINT" in text
        assert f"127.0.0.1:{peer.port}" in text
        assert peer.connections == len(peer.received) >= 1
        assert set(peer.received) == {b""}


@pytest.mark.usefixtures("ca")
def test_a_wrong_fingerprint_refuses_even_what_a_ca_vouches_for(signed: Certificate) -> None:
    with Peer(signed) as peer:
        assert SHOWN_OTHER in refuses(peer, Trust(pinned=OTHER), "localhost")
    assert set(peer.received) == {b""}


def test_a_stranger_is_refused_with_its_fingerprint_and_told_nothing(self_signed: Certificate) -> None:
    with Peer(self_signed) as peer:
        text = refuses(peer, Trust())
    assert "the certificate is not trusted" in text
    assert f"its fingerprint is {self_signed.fingerprint}" in text
    assert "accept it with --fingerprint or PBS_FINGERPRINT" in text
    assert set(peer.received) == {b""}


def test_a_stranger_that_is_gone_again_is_refused_all_the_same(
    self_signed: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_arguments: object) -> str:
        raise ConnectError("gone")

    monkeypatch.setattr(tls, "peek_fingerprint", gone)
    with Peer(self_signed) as peer:
        assert "give its fingerprint with --fingerprint or PBS_FINGERPRINT" in refuses(peer, Trust())


@pytest.mark.usefixtures("ca")
def test_a_server_that_a_ca_vouches_for_is_trusted_by_its_name_only(signed: Certificate) -> None:
    with Peer(signed) as peer:
        accepts(peer, Trust(), "localhost")
    assert peer.received == [b"hello"]
    with Peer(signed) as peer:
        text = refuses(peer, Trust(), "127.0.0.1")
    assert "IP address mismatch" in text
    assert set(peer.received) == {b""}


@pytest.mark.usefixtures("ca")
def test_a_ca_vouches_for_nobody_else(self_signed: Certificate) -> None:
    with Peer(self_signed) as peer:
        refuses(peer, Trust(), "localhost")


def test_without_the_ca_its_servers_are_strangers(signed: Certificate) -> None:
    with Peer(signed) as peer:
        refuses(peer, Trust(), "localhost")


@pytest.mark.usefixtures("ca")
def test_a_new_certificate_of_a_known_server_is_trusted_when_a_ca_vouches_for_it(signed: Certificate) -> None:
    with Peer(signed) as peer:
        accepts(peer, Trust(known=OTHER), "localhost")
    assert peer.received == [b"", b"hello"]  # the first connection found out
    with Peer(signed) as peer:
        assert SHOWN_OTHER in refuses(peer, Trust(known=OTHER), "127.0.0.1")
    assert set(peer.received) == {b""}


def test_a_look_at_the_fingerprint_tells_the_server_nothing(self_signed: Certificate) -> None:
    with Peer(self_signed) as peer:
        assert peek_fingerprint(peer.repository()) == fingerprint_of(self_signed)
    assert peer.received == [b""]


# --- who can't be talked to


@pytest.mark.parametrize("greeting", [b"SSH-2.0-OpenSSH_9.2p1\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_what_does_not_speak_tls_is_no_server_of_ours(greeting: bytes) -> None:
    def talk(connection: socket.socket) -> None:
        connection.sendall(greeting)
        connection.recv(1 << 16)

    for trust in (Trust(), Trust(pinned=OTHER)):
        with Peer(talk=talk) as peer, pytest.raises(WrongServerError, match="does not speak TLS") as caught:
            connect(peer.repository(), trust)
        assert not caught.value.retryable
        assert f"127.0.0.1:{peer.port}" in str(caught.value)


def test_a_connection_that_is_lost_in_the_handshake_may_be_tried_again() -> None:
    def close(connection: socket.socket) -> None:
        connection.recv(1 << 16)

    def cut(connection: socket.socket) -> None:
        connection.recv(1 << 16)
        reset(connection)

    for talk in (close, cut):
        with Peer(talk=talk) as peer, pytest.raises(ConnectError) as caught:
            connect(peer.repository(), Trust(pinned=OTHER))
        assert caught.value.retryable


def test_a_connection_that_was_lost_before_the_handshake_is_never_taken_for_a_verified_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make = tls._connect_tcp

    def lost(
        repository: Repository, proxy: Proxy | None, limits: ServerLimits
    ) -> tuple[socket.socket, float]:
        plain, round_trip = make(repository, proxy, limits)
        poll = select.poll()
        poll.register(plain, 0)  # tells of the reset, which nobody asks for
        assert poll.poll(20_000)
        with contextlib.suppress(OSError):
            plain.recv(1)
        return plain, round_trip

    monkeypatch.setattr(tls, "_connect_tcp", lost)
    for trust in (Trust(), Trust(pinned=OTHER)):
        with Peer(talk=reset) as peer, pytest.raises(ConnectError) as caught:
            connect(peer.repository(), trust)
        assert caught.value.retryable


NOTHING_LISTENS = "; nothing listens there: check the host and port, and that proxmox-backup-proxy runs on it"


def test_an_address_that_does_not_answer_leads_to_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(_self: socket.socket, _place: object) -> None:
        raise OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))

    monkeypatch.setattr(socket.socket, "connect", unreachable)
    with pytest.raises(ConnectError) as caught:
        connect(Repository("u@pam", None, "127.0.0.1", 9, "store"), Trust())
    assert str(caught.value) == (
        "cannot connect to 127.0.0.1:9: No route to host; "
        "check the host and port, the network, and the firewalls between"
    )


def test_a_closed_port_says_so() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        with pytest.raises(
            ConnectError, match=f"cannot connect to 127.0.0.1:{port}: Connection refused"
        ) as caught:
            connect(Repository("u@pam", None, "127.0.0.1", port, "store"), Trust())
    assert caught.value.retryable


@pytest.mark.parametrize(
    ("port", "store", "hint"),
    [
        (8007, "18007", "; if 18007 is the port, write u@pam@127.0.0.1:18007:DATASTORE"),
        (8007, "store", NOTHING_LISTENS),
        (8008, "18007", NOTHING_LISTENS),
    ],
)
def test_a_closed_port_leads_to_the_one_that_may_be_meant(
    monkeypatch: pytest.MonkeyPatch, port: int, store: str, hint: str
) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        place = (socket.AF_INET, socket.SOCK_STREAM, 0, "", bound.getsockname())
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_a, **_o: [place])
        with pytest.raises(ConnectError) as caught:
            connect(Repository("u@pam", None, "127.0.0.1", port, store), Trust())
    assert str(caught.value) == f"cannot connect to 127.0.0.1:{port}: Connection refused{hint}"


SHORT = ServerLimits(connect_timeout=0.05)


@contextlib.contextmanager
def black_hole() -> Iterator[int]:
    """A port that answers no more connections: its queue is full."""
    with socket.socket() as listening, contextlib.ExitStack() as waiting:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for _ in range(3):
            filler = waiting.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listening.getsockname())
        yield listening.getsockname()[1]


def test_a_server_that_does_not_answer_is_given_up() -> None:
    with black_hole() as port, pytest.raises(ConnectError, match="no answer within") as caught:
        connect(Repository("u@pam", None, "127.0.0.1", port, "store"), Trust(), limits=SHORT)
    assert caught.value.retryable


def test_a_server_that_is_silent_in_the_handshake_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(ConnectError, match="no TLS connection: no answer within") as caught:
            connect(Repository("u@pam", None, "127.0.0.1", port, "store"), Trust(), limits=SHORT)
    assert caught.value.retryable


def test_a_name_that_does_not_resolve_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_arguments: object, **_options: object) -> object:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    expected = "the name 'pbs.example.com' does not resolve: Name or service not known; check the host in "
    with pytest.raises(ResolveError, match=expected) as caught:
        connect(Repository.parse("pbs.example.com:store"), Trust())
    assert caught.value.retryable


@pytest.mark.parametrize("host", ["a..b", "x" * 64 + ".example.com"])
def test_a_name_that_could_be_nobodys_does_not_resolve(host: str) -> None:
    with pytest.raises(ResolveError, match="does not resolve"):
        connect(Repository("u@pam", None, host, 8007, "store"), Trust())


def test_every_address_of_a_name_is_tried(self_signed: Certificate, monkeypatch: pytest.MonkeyPatch) -> None:
    with Peer(self_signed) as peer, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        stream = socket.SOCK_STREAM
        addresses: list[object] = [
            (9999, stream, 0, "", ("nowhere", 1)),  # a family that no system has
            (socket.AF_INET, stream, 0, "", closed.getsockname()),
            (socket.AF_INET, stream, 0, "", ("127.0.0.1", peer.port)),
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_a, **_o: addresses)
        accepts(peer, Trust(pinned=fingerprint_of(self_signed)), "pbs.example.com")
        del addresses[1:]
        with pytest.raises(ConnectError, match=r"cannot connect to pbs\.example\.com"):
            connect(peer.repository("pbs.example.com"), Trust())


def test_versions_of_tls_that_are_broken_are_not_spoken(self_signed: Certificate) -> None:
    with Peer(self_signed) as peer:
        assert peer._context is not None
        peer._context.set_ciphers("DEFAULT:@SECLEVEL=0")
        with pytest.warns(DeprecationWarning, match="deprecated"):
            peer._context.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(WrongServerError):
            connect(peer.repository(), Trust(pinned=fingerprint_of(self_signed)))
