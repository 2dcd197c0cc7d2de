"""Logging in, and staying logged in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from pbsfs.base.errors import (
    AuthError,
    SourceError,
    UnknownRealmError,
    WrongServerError,
)
from pbsfs.base.secret import Secret, Ticket
from pbsfs.sources.http.tls import Trust, parse_fingerprint
from pbsfs.sources.server.api import Api
from pbsfs.sources.server.limits import DEFAULT
from pbsfs.sources.server.login import MAX_ANSWER
from pbsfs.sources.server.repository import Repository
from pbsfs.sources.server.second_factor import Challenge, SecondFactorError
from pbsfs.sources.server.source import ServerSource
from tests.sources.server.asking import (
    DOMAINS,
    GROUPS,
    LOGIN,
    Clock,
    api_of,
    api_with,
    failure,
    got,
    logins,
    using,
)
from tests.sources.server.serving import LIMIT, PASSWORD, TOKEN, USER
from tests.support.server import (
    Hold,
    ReferenceServer,
    Status,
)
from tests.support.server.factors import Factors
from tests.support.server.releases import PBS_4
from tests.support.waiting import wait_until

# --- who asks


def test_a_password_is_sent_once_for_many_requests(server: ReferenceServer) -> None:
    api = api_of(server)

    async def work() -> None:
        for _ in range(3):
            assert (await api.get("/version", {}))["version"] == "3.2"
        (group,) = await api.get(GROUPS, {})
        assert group["backup-id"] == "100"

    using(api, work)
    assert logins(server) == 1
    assert {record.user for record in server.requests.matching("/version")} == {USER}


def test_requests_at_once_log_in_once(server: ReferenceServer) -> None:
    api = api_of(server)

    async def work() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(api.get, "/version", {})

    using(api, work)
    assert (logins(server), server.requests.count("/version")) == (1, 6)


def test_a_token_needs_no_login_and_its_secret_may_have_any_characters(server: ReferenceServer) -> None:
    assert got(api_of(server, TOKEN), GROUPS)
    assert logins(server) == 0
    server.add_token("reader@pbs!odd", "ünï %41\t\x7f\"'\r{}")
    assert got(api_of(server, "reader@pbs!odd", "ünï %41\t\x7f\"'\r{}"))
    assert server.requests.all()[-1].user == "reader@pbs!odd"


@pytest.mark.parametrize("user", ["jürgen@pbs", "a%41b@pbs", "jane@example.com@pbs", "x+y&z=1@pbs"])
def test_users_of_all_names_log_in_and_their_tickets_are_renewed(server: ReferenceServer, user: str) -> None:
    server.add_user(user, PASSWORD)
    clock = Clock()
    api = api_of(server, user, clock=clock)

    async def work() -> None:
        assert await api.get("/version", {})
        clock.ahead = DEFAULT.ticket_renewal + 1
        assert await api.get("/version", {})

    using(api, work)
    assert [record.status for record in server.requests.all()] == [200] * 4
    assert {record.user for record in server.requests.matching("/version")} == {user}


def test_a_wrong_password_is_refused_in_the_servers_words(server: ReferenceServer) -> None:
    text = failure(api_of(server, secret="hunter2"), AuthError)
    assert f"does not accept {USER} and this password: permission check failed." in text
    assert str(server.port) in text


def test_a_user_that_does_not_exist_is_refused_like_a_wrong_password(server: ReferenceServer) -> None:
    server.faults.add(Status(status=200, text=DOMAINS, match="/access/domains"))
    assert "nobody@pbs" in failure(api_of(server, "nobody@pbs"), AuthError)


def test_a_realm_that_the_server_has_not_is_told_from_a_wrong_password(server: ReferenceServer) -> None:
    server.faults.add(Status(status=200, text=DOMAINS, match="/access/domains"))
    text = failure(api_of(server, "reader@ldap"), UnknownRealmError)
    assert "has no realm 'ldap' (of reader@ldap); its realms are pam, pbs: permission check failed." in text


@pytest.mark.parametrize(
    "domains",
    ["", "[]", '{"data": null}', '{"data": []}', '{"data": [7]}', '{"data": [{"name": "x"}]}', "[" * 100_000],
)
def test_realms_that_make_no_sense_leave_a_wrong_password(server: ReferenceServer, domains: str) -> None:
    server.faults.add(Status(status=200, text=domains, match="/access/domains"))
    failure(api_of(server, "reader@ldap"), AuthError)


def test_names_of_realms_do_not_write_to_the_terminal(server: ReferenceServer) -> None:
    text = json.dumps({"data": [{"realm": "\x1b[2Jpam\n"}, {"realm": ["x\n"]}]})
    server.faults.add(Status(status=200, text=text, match="/access/domains"))
    failure(api_of(server, "reader@ldap"), UnknownRealmError)


def test_a_wrong_or_unknown_token_is_refused_at_once(server: ReferenceServer) -> None:
    text = failure(api_of(server, TOKEN, "hunter2"), AuthError)
    assert f"does not accept {TOKEN}: authentication failed - invalid credentials" in text
    failure(api_of(server, "reader@pbs!nope", "hunter2"), AuthError)
    assert server.requests.count() == 2


def test_a_token_that_is_revoked_is_refused_from_then_on(server: ReferenceServer) -> None:
    api = api_of(server, TOKEN)
    got(api)
    server.remove(TOKEN)
    failure(api, AuthError)


RECOVERY = ("0123-4567-89ab-cdef", "fedc-ba98-7654-3210")


def test_a_second_factor_is_an_error_that_has_the_challenge(server: ReferenceServer) -> None:
    server.add_user("careful@pbs", PASSWORD, factors=Factors(server.clock, recovery=RECOVERY))
    api = api_of(server, "careful@pbs")
    with pytest.raises(SecondFactorError) as caught:
        got(api)
    assert str(caught.value).startswith("careful@pbs logs in with a second factor; run pbsfs login at a ")
    assert "API token" in str(caught.value)
    assert (caught.value.challenge.totp, caught.value.challenge.recovery) == (True, True)
    assert "PBS:" not in repr(caught.value.challenge)


def test_a_second_factor_that_needs_a_browser_leaves_a_token(server: ReferenceServer) -> None:
    for factors in (
        Factors(server.clock, totp=False, webauthn=True),
        Factors(server.clock, totp=False, webauthn=True, recovery=[]),
    ):
        server.add_user("key@pbs", PASSWORD, factors=factors)
        text = failure(api_of(server, "key@pbs"), SecondFactorError)
        assert "needs a browser (WebAuthn): create an API token" in text
        assert "pbsfs login" not in text


@pytest.mark.parametrize(
    "challenge",
    ["", "{", "[]", "7", '"totp"', "[" * 100_000, '{"totp"%3A1,"recovery"%3A"available"}', "%ff%fe"],
)
def test_a_challenge_that_makes_no_sense_offers_nothing(challenge: str) -> None:
    found = Challenge.of(f"PBS:!tfa!{challenge}:65432100::c2ln")
    assert found is not None
    assert (found.totp, found.recovery, found.kinds) == (False, False, "")
    assert Challenge.of(f"PBS:!tfa!{challenge}") is not None
    assert Challenge.of("PBS:!tfa@pbs:65432100::c2ln") is None


@pytest.mark.parametrize(
    ("typed", "response"),
    [
        ("123456", "totp:123456"),
        (" 123 456\t", "totp:123456"),
        ("12345678", "totp:12345678"),
        ("0123-4567-89AB-cdef", "recovery:0123-4567-89ab-cdef"),
        ("0123456789abcdef", "recovery:0123-4567-89ab-cdef"),
        ("", None),
        ("12345", None),
        ("\u0661\u0662\u0663\u0664\u0665\u0666", None),
        ("password", None),
        ("0123-4567-89ab-cdeg", None),
        ("totp:123456", None),
    ],
)
def test_what_a_user_types_is_a_code_or_a_recovery_code(typed: str, response: str | None) -> None:
    challenge = Challenge(Secret("PBS:!tfa!"), totp=True, recovery=True)
    found = challenge.response(typed)
    assert (found.reveal() if found is not None else None) == response
    assert Challenge(Secret(""), totp=False, recovery=False).response(typed) is None


def careful(server: ReferenceServer, factors: Factors) -> Api:
    server.add_user("careful@pbs", PASSWORD, factors=factors)
    return api_of(server, "careful@pbs")


async def challenge_of(api: Api) -> Challenge:
    with pytest.raises(SecondFactorError) as caught:
        await api.get("/version", {})
    return caught.value.challenge


@pytest.mark.parametrize("in_cookie", [False, True])
def test_the_answer_to_a_challenge_gives_a_ticket(datastore: Path, in_cookie: bool) -> None:
    with ReferenceServer(datastore, release=PBS_4, ticket_in_cookie=in_cookie) as server:
        factors = Factors(server.clock, recovery=RECOVERY)
        api = careful(server, factors)

        async def work() -> None:
            challenge = await challenge_of(api)
            assert await api.login.answer(challenge, Secret("recovery:0000-0000-0000-0000")) is None
            assert await api.login.answer(challenge, Secret(f"totp:{factors.code()}")) is not None
            assert (await api.get("/version", {}))["version"] == "4.2"

        using(api, work)


def test_a_ticket_is_used_and_renewed_instead_of_a_password(server: ReferenceServer) -> None:
    ticket = Ticket(server.accounts.tickets.issue(USER))
    server.clock.advance(7000)  # it is about to expire
    clock = Clock()
    api = api_with(server, ticket, clock=clock)

    async def work() -> None:
        for _ in range(5):
            assert await api.get("/version", {})
            server.clock.advance(DEFAULT.ticket_renewal + 1)
            clock.ahead += DEFAULT.ticket_renewal + 1

    using(api, work)
    assert {record.status for record in server.requests.all()} == {200}
    assert PASSWORD not in str(server.requests.all())


def test_a_ticket_that_has_expired_says_to_log_in_again(server: ReferenceServer) -> None:
    ticket = Ticket(server.accounts.tickets.issue(USER))
    server.clock.advance(7201)
    text = failure(api_with(server, ticket), AuthError)
    assert text.startswith(
        f"the login of {USER} at {server.host}:{server.port} is no longer valid; run pbsfs "
    )
    assert logins(server) == 1


def test_a_ticket_that_has_expired_leaves_the_password(server: ReferenceServer) -> None:
    ticket = Ticket(server.accounts.tickets.issue(USER), Secret(PASSWORD))
    server.clock.advance(7201)
    assert got(api_with(server, ticket))
    assert [record.status for record in server.requests.matching(LOGIN)] == [401, 200]


def test_a_server_that_fails_to_renew_a_ticket_is_asked_again(server: ReferenceServer) -> None:
    api = api_with(server, Ticket(server.accounts.tickets.issue(USER)))
    server.faults.add(Status(status=500, text="busy", match=LOGIN))

    async def work() -> None:
        with pytest.raises(SourceError, match="busy") as caught:
            await api.get("/version", {})
        assert caught.value.retryable
        assert await api.get("/version", {})

    using(api, work)


QUICK = replace(DEFAULT, ticket_renewal=0.02, renewal_pause=0.01)


def test_a_ticket_without_a_password_is_renewed_while_nobody_reads(server: ReferenceServer) -> None:
    api = api_with(server, Ticket(server.accounts.tickets.issue(USER)), limits=QUICK)
    server.faults.add(Status(status=503, text="busy", match=LOGIN))
    server.faults.add(Status(status=405, text="a proxy", match=LOGIN))
    server.faults.add(Status(status=200, text="x" * (MAX_ANSWER + 1), match=LOGIN))

    async def work() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(api.login.keep)
            await trio.to_thread.run_sync(wait_until, lambda: logins(server) >= 6, "it is renewed")
            nursery.cancel_scope.cancel()

    using(api, work)
    found = [record.status for record in server.requests.matching(LOGIN)]
    assert found[:5] == [503, 405, 200, 200, 200]
    assert server.requests.count("/version") == 0


def test_an_open_source_keeps_its_ticket(server: ReferenceServer) -> None:
    trust = Trust(pinned=parse_fingerprint(server.fingerprint))
    repository = Repository.parse(server.repository(USER))
    ticket = Ticket(server.accounts.tickets.issue(USER))
    source = ServerSource(repository, ticket, trust, limits=QUICK)

    async def main() -> None:
        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                await source.open(nursery)
                before = logins(server)
                await trio.to_thread.run_sync(wait_until, lambda: logins(server) >= before + 3, "renewals")
                nursery.cancel_scope.cancel()
            await source.aclose()

    trio.run(main)


def test_renewing_ends_with_a_warning_when_the_ticket_is_refused(
    server: ReferenceServer, caplog: pytest.LogCaptureFixture
) -> None:
    api = api_with(server, Ticket(server.accounts.tickets.issue(USER)), limits=QUICK)
    server.remove(USER)
    using(api, api.login.keep)
    (record,) = caplog.records
    assert "is no longer valid; run pbsfs login again" in record.getMessage()
    caplog.clear()


def test_what_a_password_can_replace_is_not_renewed_while_nobody_reads(server: ReferenceServer) -> None:
    for secret in (Secret(PASSWORD), Ticket(server.accounts.tickets.issue(USER), Secret(PASSWORD))):
        api = api_with(server, secret, limits=QUICK)
        using(api, api.login.keep)
    api = api_of(server, TOKEN)
    using(api, api.login.keep)
    assert server.requests.count() == 0


def test_a_ticket_that_comes_in_a_cookie_only_is_taken_from_there(datastore: Path) -> None:
    clock = Clock()
    with ReferenceServer(datastore, release=PBS_4, ticket_in_cookie=True) as server:
        for user in (USER, "jürgen@pbs"):
            server.add_user(user, PASSWORD)
            api = api_of(server, user, clock=clock)

            async def work(api: Api = api) -> None:
                assert (await api.get("/version", {}))["version"] == "4.2"
                clock.ahead += DEFAULT.ticket_renewal + 1
                assert await api.get("/version", {})

            using(api, work)
        assert {record.status for record in server.requests.all()} == {200}


@pytest.mark.parametrize(
    "answer",
    ["", "{}", "[]", '{"data": null}', '{"data": {}}', '{"data": {"ticket": 7}}', '{"data": "x"}', "{"],
)
def test_a_login_that_gives_no_ticket_is_not_one_of_ours(server: ReferenceServer, answer: str) -> None:
    server.faults.add(Status(status=200, text=answer, match=LOGIN))
    assert "invalid login ticket" in failure(api_of(server), WrongServerError)


# --- staying logged in


def test_a_ticket_is_renewed_after_an_hour_and_not_before(server: ReferenceServer) -> None:
    clock = Clock()
    api = api_of(server, clock=clock)

    async def work() -> None:
        await api.get("/version", {})
        clock.ahead = DEFAULT.ticket_renewal - 60
        await api.get("/version", {})
        assert logins(server) == 1
        clock.ahead = DEFAULT.ticket_renewal + 1
        await api.get("/version", {})
        assert logins(server) == 2
        clock.ahead = 2 * DEFAULT.ticket_renewal - 60
        await api.get("/version", {})
        assert logins(server) == 2

    using(api, work)
    assert DEFAULT.ticket_renewal == 3600


def test_a_ticket_is_renewed_by_itself_for_weeks_even_with_a_new_password(server: ReferenceServer) -> None:
    clock = Clock()
    api = api_of(server, clock=clock)

    async def work() -> None:
        await api.get("/version", {})
        server.add_user(USER, "another password")
        for _ in range(24):
            server.clock.advance(DEFAULT.ticket_renewal + 1)
            clock.ahead += DEFAULT.ticket_renewal + 1
            await api.get("/version", {})

    using(api, work)
    assert {record.status for record in server.requests.all()} == {200}
    assert logins(server) == 25


def test_where_the_old_ticket_is_refused_the_password_is_used(server: ReferenceServer) -> None:
    clock = Clock()
    api = api_of(server, clock=clock)

    async def work() -> None:
        await api.get("/version", {})
        server.clock.advance(3 * DEFAULT.ticket_renewal)
        clock.ahead = 3 * DEFAULT.ticket_renewal
        await api.get("/version", {})

    using(api, work)
    assert [record.status for record in server.requests.matching(LOGIN)] == [200, 401, 200]


def test_a_ticket_that_is_refused_in_between_leads_to_one_new_login(server: ReferenceServer) -> None:
    api = api_of(server)

    async def work() -> None:
        await api.get("/version", {})
        server.clock.advance(3 * DEFAULT.ticket_renewal)
        assert await api.get(GROUPS, {})

    using(api, work)
    assert [record.status for record in server.requests.matching(GROUPS)] == [401, 200]
    assert logins(server) == 2


def test_requests_at_once_that_are_all_refused_are_all_asked_again(server: ReferenceServer) -> None:
    api = api_of(server)
    answers = []

    async def ask() -> None:
        answers.append(await api.get(GROUPS, {}))

    async def work() -> None:
        await api.get("/version", {})
        server.clock.advance(3 * DEFAULT.ticket_renewal)
        held = server.faults.add(Hold(match=GROUPS, times=5))
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(ask)
            await trio.to_thread.run_sync(wait_until, lambda: held.hits == 5, "five requests")
            held.release()

    using(api, work)
    assert len(answers) == 5
    assert sorted(record.status for record in server.requests.matching(GROUPS)) == [200] * 5 + [401] * 5
    assert logins(server) == 2


def test_a_new_ticket_is_not_forgotten_for_the_refusal_of_an_old_one(server: ReferenceServer) -> None:
    api = api_of(server)

    async def work() -> None:
        old = await api.login.headers()
        assert api.login.forget_ticket(old)
        server.clock.advance(5)
        new = await api.login.headers()
        assert new != old
        assert api.login.forget_ticket(old)
        assert await api.login.headers() == new

    using(api, work)
    assert logins(server) == 2
    assert not api_of(server, TOKEN).login.forget_ticket({"Authorization": "PBSAPIToken x:y"})


def test_who_is_refused_again_after_a_new_login_is_refused(server: ReferenceServer) -> None:
    server.faults.add(Status(status=401, text="no and no", match="/version", times=None))
    assert "no and no" in failure(api_of(server), AuthError)
    assert (server.requests.count("/version"), logins(server)) == (2, 2)


def test_a_password_that_changed_meanwhile_is_told_of(server: ReferenceServer) -> None:
    api = api_of(server)

    async def work() -> None:
        await api.get("/version", {})
        server.add_user(USER, "another password")
        server.clock.advance(3 * DEFAULT.ticket_renewal)
        with pytest.raises(AuthError, match="permission check failed"):
            await api.get("/version", {})

    using(api, work)
