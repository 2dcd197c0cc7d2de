"""Logging in, and staying logged in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trio

from pbsfs.base.errors import (
    AuthError,
    NotPbsError,
    UnknownRealmError,
)
from pbsfs.sources.server.api import Api
from pbsfs.sources.server.limits import DEFAULT
from tests.sources.server.asking import (
    DOMAINS,
    GROUPS,
    LOGIN,
    Clock,
    api_of,
    failure,
    got,
    logins,
    using,
)
from tests.sources.server.serving import PASSWORD, TOKEN, USER
from tests.support.server import (
    Hold,
    ReferenceServer,
    Status,
)
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


def test_a_second_factor_cannot_be_given_and_a_token_is_the_way(server: ReferenceServer) -> None:
    server.add_user("careful@pbs", PASSWORD, second_factor=True)
    text = failure(api_of(server, "careful@pbs"), AuthError)
    assert "second factor" in text
    assert "API token" in text


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
    assert "invalid login ticket" in failure(api_of(server), NotPbsError)


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
