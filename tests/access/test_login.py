"""Logging in at a terminal: what the user is asked for, and what a wrong answer leads to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pbsfs.access.login import MAX_TRIES, log_in
from pbsfs.access.terminal import Terminal
from pbsfs.base.errors import AuthError
from pbsfs.base.secret import Secret, Ticket
from pbsfs.sources.http.tls import Trust, parse_fingerprint
from pbsfs.sources.server.repository import Repository
from pbsfs.sources.server.second_factor import SecondFactorError
from tests.support.server import ReferenceServer
from tests.support.server.factors import TOTP_LIMIT, Factors
from tests.support.serving import PASSWORD, STORE, USER
from tests.support.stocked import stock

RECOVERY = ("0123-4567-89ab-cdef", "fedc-ba98-7654-3210")


class Somebody(Terminal):
    """Types `answers`, each when asked; a function's result for what only then is known."""

    def __init__(self, *answers: str | Callable[[], str]) -> None:
        self.left = list(answers)
        self.questions: list[str] = []

    def password(self, text: str) -> Secret:
        self.questions.append(text)
        answer = self.left.pop(0)
        return Secret(answer if isinstance(answer, str) else answer())

    def confirm(self, text: str) -> bool:
        raise AssertionError(text)


@pytest.fixture(scope="module")
def server_of_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReferenceServer]:
    with ReferenceServer(stock(tmp_path_factory.mktemp("s") / "datastore").path, store=STORE) as found:
        yield found


@pytest.fixture
def server(server_of_all: ReferenceServer) -> ReferenceServer:
    server_of_all.clock.set(1_700_000_000)
    server_of_all.requests.clear()
    return server_of_all


def login(
    server: ReferenceServer, terminal: Terminal | None, factors: Factors | None, password: str = PASSWORD
) -> Ticket:
    server.add_user(USER, PASSWORD, factors=factors)
    trust = Trust(pinned=parse_fingerprint(server.fingerprint))
    return log_in(Repository.parse(server.repository(USER)), Secret(password), trust, None, terminal)


def is_good(server: ReferenceServer, ticket: Ticket) -> bool:
    return server.accounts.tickets.user_of(ticket.reveal()) == USER


def test_without_a_second_factor_nobody_is_asked(server: ReferenceServer) -> None:
    ticket = login(server, None, None)
    assert is_good(server, ticket)
    assert ticket.password is not None
    assert ticket.password.reveal() == PASSWORD
    assert server.requests.count() == 1


def test_a_code_of_the_app_is_asked_for(server: ReferenceServer) -> None:
    factors = Factors(server.clock)
    somebody = Somebody(factors.code)
    ticket = login(server, somebody, factors)
    assert is_good(server, ticket)
    assert ticket.password is None, "the password alone is not enough"
    (question,) = somebody.questions
    assert question == f"code of the authenticator app of {USER} at {server.host}:{server.port}"


def test_a_recovery_code_does_as_well(server: ReferenceServer) -> None:
    for factors in (
        Factors(server.clock, recovery=RECOVERY),
        Factors(server.clock, totp=False, webauthn=True, recovery=RECOVERY),
    ):
        somebody = Somebody(f" {RECOVERY[1].upper()} ")
        assert is_good(server, login(server, somebody, factors))
        assert "recovery code of" in somebody.questions[0]


def test_what_is_no_code_is_not_sent(server: ReferenceServer) -> None:
    factors = Factors(server.clock)
    somebody = Somebody("", "what?", RECOVERY[0], factors.code)
    assert is_good(server, login(server, somebody, factors))
    assert somebody.questions[1:] == ["this is not a code of the authenticator app; try again"] * 3
    assert server.requests.count("/access/ticket") == 2


def test_a_wrong_code_is_asked_for_again(server: ReferenceServer) -> None:
    factors = Factors(server.clock)
    somebody = Somebody("000000", factors.code)
    assert is_good(server, login(server, somebody, factors))
    assert somebody.questions[1].startswith(
        "the server does not accept it: it is wrong, too old, or was used"
    )


def test_a_challenge_that_has_expired_is_replaced(server: ReferenceServer) -> None:
    factors = Factors(server.clock)

    def late() -> str:
        server.clock.advance(601)
        return factors.code()

    somebody = Somebody(late, lambda: factors.code(1))
    assert is_good(server, login(server, somebody, factors))


def test_codes_are_not_tried_until_the_server_locks_them(server: ReferenceServer) -> None:
    factors = Factors(server.clock)
    somebody = Somebody(*["000000"] * MAX_TRIES)
    with pytest.raises(
        AuthError, match="does not accept the second factor of reader@pbs; wait for"
    ) as caught:
        login(server, somebody, factors)
    assert "user tfa unlock reader@pbs" in str(caught.value)
    assert MAX_TRIES < TOTP_LIMIT
    assert not factors.totp_locked


def test_locked_codes_are_refused_and_a_recovery_code_unlocks_them(server: ReferenceServer) -> None:
    factors = Factors(server.clock, recovery=RECOVERY)
    factors.totp_locked = True
    somebody = Somebody(factors.code, factors.code, RECOVERY[0])
    assert is_good(server, login(server, somebody, factors))
    assert is_good(server, login(server, Somebody(factors.code), factors))


@pytest.mark.parametrize("webauthn", [False, True])
def test_where_nobody_can_answer_it_is_an_error(server: ReferenceServer, webauthn: bool) -> None:
    factors = Factors(server.clock, totp=not webauthn, webauthn=webauthn)
    somebody = Somebody() if webauthn else None
    with pytest.raises(SecondFactorError, match="create an API token for this user") as caught:
        login(server, somebody, factors)
    assert ("WebAuthn" in str(caught.value)) == webauthn


def test_a_wrong_password_is_not_asked_for_a_second_factor(server: ReferenceServer) -> None:
    somebody = Somebody()
    with pytest.raises(AuthError, match="and this password"):
        login(server, somebody, Factors(server.clock), "wrong")
    assert somebody.questions == []


def test_no_answer_is_logged(
    server: ReferenceServer, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level("DEBUG")
    factors = Factors(server.clock, recovery=RECOVERY)
    ticket = login(server, Somebody(RECOVERY[0]), factors)
    for secret in (RECOVERY[0], PASSWORD, ticket.reveal(), "tfa"):
        assert secret not in caplog.text
