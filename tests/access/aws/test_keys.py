"""The places that give a key: what they are asked, what counts as a key, and what is said where none is."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import stat
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from pbsfs.access.aws import keys, services
from pbsfs.access.aws.ask import Reply, Route, Service
from pbsfs.access.aws.keys import CommandKey, GivenKey, KeySource, NoKey
from pbsfs.access.aws.kinds import KINDS, dump_key, load_key
from pbsfs.access.aws.renewed import Renewed
from pbsfs.access.aws.services import ContainerKey, InstanceKey, NoServiceError
from pbsfs.access.aws.sso import LoginKey
from pbsfs.access.aws.sts import RoleKey, WebIdentityKey
from pbsfs.base.errors import (
    AuthError,
    ConnectError,
    ForbiddenError,
    SourceError,
    TrustError,
    WrongServerError,
)
from pbsfs.sources.bucket.credentials import AwsCredentials
from tests.support.keyservice import KEY_JSON, STS_XML, KeyService, key_service, raw_service
from tests.support.s3 import signature
from tests.support.server import certificate as certificates

END = 7226582400.0
"""2199-01-01."""

KEY = AwsCredentials("ASIAEXAMPLE", "secret/of+it", "token==", END)

ROLE = "arn:aws:iam::123456789012:role/reader"
CREDENTIALS = "/latest/meta-data/iam/security-credentials/"

SOURCES: list[KeySource] = [
    NoKey(),
    GivenKey("the environment", "AKIDEXAMPLE", "s3cret", "t0ken"),
    CommandKey("credential_process", "print-key --secret s3cret"),
    WebIdentityKey("https://sts", ROLE, "/token", "me", Route({"HTTPS_PROXY": "http://u:s3cret@proxy"})),
    RoleKey("https://sts", "r", ROLE, "me", GivenKey("x", "A", "s3cret", "t0ken"), "e", 900, Route({})),
    LoginKey(
        "https://portal",
        "https://oidc",
        "1",
        "Reader",
        "/token.json",
        "ci",
        Route({"HTTPS_PROXY": "http://u:s3cret@proxy"}, "/ca"),
    ),
    ContainerKey("http://127.0.0.1/s3cret", "t0ken", None),
    InstanceKey("http://127.0.0.1", "no key"),
]


def refused(source: KeySource, kind: type[SourceError] = AuthError) -> str:
    with pytest.raises(kind) as caught:
        source.fetch()
    text = str(caught.value)
    assert "secret/of+it" not in text
    assert "token==" not in text
    return text


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.kind)
def test_each_place_can_be_handed_over_and_shows_no_secret(source: KeySource) -> None:
    found = load_key(json.loads(json.dumps(dump_key(source))))
    assert found == source
    assert "s3cret" not in str(found)
    assert "t0ken" not in str(found)
    assert "s3cret" not in repr(found)


def test_every_kind_is_handed_over_here() -> None:
    assert {source.kind for source in SOURCES} == set(KINDS)


# --- keys as they are


def test_a_given_key_is_that_key() -> None:
    source = GivenKey("here", "AKIDEXAMPLE", "secret")
    assert source.fetch() == AwsCredentials("AKIDEXAMPLE", "secret", None, None)
    assert str(source) == "AKIDEXAMPLE of here"


def test_no_key_leaves_requests_unsigned() -> None:
    source: KeySource = NoKey()
    assert source.fetch() is None


@pytest.mark.parametrize(
    ("access", "secret", "said"),
    [
        ("", "s", "here: it has no access key; correct it"),
        ("A", "", "here: it has no secret key; correct it"),
        ("A\r\nX: y", "s", "here: the access key has characters that no key has; correct it"),
        ("A", "s\n", "here: the secret key has characters that no key has; correct it"),
        ("Ä", "s", "here: the access key has characters that no key has; correct it"),
    ],
)
def test_a_key_that_is_none_is_refused(access: str, secret: str, said: str) -> None:
    assert refused(GivenKey("here", access, secret)) == said


# --- a command


def command(program: str) -> CommandKey:
    return CommandKey("credential_process of x", f"{sys.executable} -c {json.dumps(program)}")


def test_a_command_prints_the_key() -> None:
    assert command(f"print('''{KEY_JSON.decode()}''')").fetch() == KEY


def test_a_command_gets_no_secret_in_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEEN", "yes")
    program = "import os, json; print(json.dumps({'Version': 1, 'AccessKeyId': os.environ['SEEN'], "
    program += "'SecretAccessKey': os.environ.get('PBS_PASSWORD', 'none')}))"
    monkeypatch.setenv("PBS_PASSWORD", "geheim")
    found = command(program.replace('"', "'")).fetch()
    assert (found.access_key, found.secret_key) == ("yes", "none")
    assert os.environ["PBS_PASSWORD"] == "geheim"  # the program's own stays: nbdkit's plugin reads it later


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("raise SystemExit(3)", "the command ended with status 3; run it in a shell to see why"),
        (
            "import os; os.kill(os.getpid(), 9)",
            "the command was ended by signal 9; run it in a shell to see why",
        ),
        ("print('hello secret/of+it')", "what it gives is not a key in JSON"),
        ("print('[' * 100000)", "what it gives is not a key in JSON"),
        ("print('{}')", "the key has no Version 1; update the command"),
        ("import json; print(json.dumps(dict(Version=1)))", "it has no access key"),
    ],
)
def test_a_command_that_prints_no_key(program: str, said: str) -> None:
    text = refused(command(program))
    assert text.startswith("credential_process of x: ")
    assert said in text


def test_a_command_that_does_not_exist_or_is_none() -> None:
    assert "No such file" in refused(CommandKey("x", "/nowhere/command"))
    assert "not a command" in refused(CommandKey("x", "'"))
    assert "not a command" in refused(CommandKey("x", " "))


def test_a_command_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "COMMAND_TIMEOUT", 0.2)
    assert "did not end within 0 s" in refused(command("input.__self__.__import__('time').sleep(60)"))


def test_a_key_that_has_expired_is_refused() -> None:
    data = KEY_JSON.replace(b"2199", b"2020").decode()
    assert "the key has expired" in refused(command(f"print('''{data}''')"))


def test_an_expiration_that_is_no_time_is_refused() -> None:
    data = KEY_JSON.replace(b"2199-01-01T00:00:00Z", b"tomorrow").decode()
    assert "Expiration is not a time" in refused(command(f"print('''{data}''')"))


# --- web identity


@pytest.fixture
def token(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.write_text("ey.web.token\n")
    return file


def identity(url: str, token: Path, **proxies: str) -> WebIdentityKey:
    return WebIdentityKey(f"{url}/", ROLE, str(token), "me", Route(proxies))


def test_sts_gives_the_key_of_a_role_for_a_token(token: Path) -> None:
    with key_service({("POST", "/"): (200, STS_XML)}) as service:
        assert identity(service.url, token).fetch() == KEY
        token.write_text("ey.next.token")  # Kubernetes replaces it
        identity(service.url, token).fetch()
    assert [parse_qs(asked.body) for asked in service.asked] == [
        {
            "Action": ["AssumeRoleWithWebIdentity"],
            "Version": ["2011-06-15"],
            "RoleArn": [ROLE],
            "RoleSessionName": ["me"],
            "WebIdentityToken": [text],
        }
        for text in ("ey.web.token", "ey.next.token")
    ]


def test_sts_is_verified_by_the_ca_that_was_named(token: Path) -> None:
    certificate = certificates.make(ca_signed=True)
    with key_service({("POST", "/"): (200, STS_XML)}, certificate) as service:
        source = WebIdentityKey(f"{service.url}/", ROLE, str(token), "me", Route({}, certificate.ca))
        assert source.fetch() == KEY
        assert "certificate is not trusted" in refused(identity(service.url, token), TrustError)
    assert len(service.asked) == 1, "no token goes to a service that is not trusted"


def test_sts_is_asked_through_the_proxy_of_the_environment(token: Path) -> None:
    with raw_service(b"HTTP/1.1 403 Forbidden\r\n\r\n") as url:
        text = refused(identity("https://sts.example.com", token, https_proxy=url), ForbiddenError)
    assert "refuses connections to sts.example.com:443" in text


def test_a_refusal_of_sts_is_told_with_its_words(token: Path) -> None:
    body = b"<E><Error><Code>AccessDenied</Code><Message>Not\nauthorized</Message></Error></E>"
    with key_service({("POST", "/"): (403, body)}) as service:
        text = refused(identity(service.url, token))
    assert f"gives no key for the role {ROLE} (status 403): AccessDenied: Not authorized; check" in text
    assert "ey.web" not in text


def test_a_failure_of_sts_may_pass(token: Path) -> None:
    with key_service({("POST", "/"): (503, b"<html>")}) as service:
        assert "(status 503)" in refused(identity(service.url, token), ConnectError)


def test_entities_of_an_answer_of_sts_are_never_expanded(token: Path) -> None:
    body = b'<!DOCTYPE x [<!ENTITY a "' + b"b" * 1000 + b'">]>' + STS_XML.replace(b"ASIA", b"&a;")
    with key_service({("POST", "/"): (200, body)}) as service:
        assert "it has no access key" in refused(identity(service.url, token))
    hidden = body.decode().encode("utf-16")
    with key_service({("POST", "/"): (200, hidden)}) as service:
        assert "it has no access key" in refused(identity(service.url, token))


def test_a_token_file_that_is_missing_or_no_token(token: Path, tmp_path: Path) -> None:
    assert "check the file of the token" in refused(identity("http://127.0.0.1", tmp_path / "none"))
    token.write_bytes(b"\xff")
    assert "not UTF-8" in refused(identity("http://127.0.0.1", token))
    token.write_text("a\rb\n")
    assert "characters that no token has" in refused(identity("http://127.0.0.1", token))


# --- a role


def role(url: str, source: KeySource | None = None, **changed: Any) -> RoleKey:
    key = source or GivenKey("here", "AKIDEXAMPLE", "s3cret", "t0ken")
    return replace(RoleKey(f"{url}/", "eu-west-1", ROLE, "me", key, None, None, Route({})), **changed)


def test_sts_gives_the_key_of_a_role_for_a_signed_request() -> None:
    with key_service({("POST", "/"): (200, STS_XML)}) as service:
        assert role(service.url).fetch() == KEY
        assert role(service.url, external_id="ext/1", duration=3600).fetch() == KEY
    usual = {
        "Action": ["AssumeRole"],
        "Version": ["2011-06-15"],
        "RoleArn": [ROLE],
        "RoleSessionName": ["me"],
    }
    more = {"ExternalId": ["ext/1"], "DurationSeconds": ["3600"]}
    assert [parse_qs(asked.body) for asked in service.asked] == [usual, usual | more]
    for asked in service.asked:
        assert asked.headers["x-amz-content-sha256"] == hashlib.sha256(asked.body.encode()).hexdigest()
        assert asked.headers["x-amz-security-token"] == "t0ken"
        assert asked.headers["content-type"] == "application/x-www-form-urlencoded"
        given = ("AKIDEXAMPLE", "s3cret", "eu-west-1", "sts")
        assert signature.refused("POST", "/", asked.headers, *given) is None
        assert "s3cret" not in asked.body + str(asked.headers)


def test_a_role_is_taken_with_the_key_of_another_role_each_time() -> None:
    with key_service({("POST", "/"): (200, STS_XML)}) as service:
        assert role(service.url, role(service.url)).fetch() == KEY
    first, second = service.asked
    assert "AKIDEXAMPLE" in first.headers["authorization"]
    assert "ASIAEXAMPLE" in second.headers["authorization"]
    assert second.headers["x-amz-security-token"] == "token=="


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (403, "AccessDenied", AuthError),
        (403, "ExpiredToken", AuthError),
        (400, "Throttling", ConnectError),
        (503, "ServiceUnavailable", ConnectError),
    ],
)
def test_a_role_that_sts_refuses_is_told_with_its_words(
    status: int, code: str, kind: type[SourceError]
) -> None:
    body = f"<E><Error><Code>{code}</Code><Message>No</Message></Error></E>".encode()
    with key_service({("POST", "/"): (status, body)}) as service:
        text = refused(role(service.url), kind)
    assert f"gives no key for the role {ROLE} (status {status}): {code}: No" in text


def test_a_role_is_not_taken_without_a_key() -> None:
    assert "it takes a key; name its source_profile" in refused(role("http://127.0.0.1", NoKey()))
    broken = GivenKey("here", "", "s")
    assert refused(role("http://127.0.0.1", broken)) == "here: it has no access key; correct it"


# --- a login

CREDENTIALS_OF = "/federation/credentials?role_name=Reader&account_id=123456789012"
LOGIN_JSON = b"""{"roleCredentials": {
  "accessKeyId": "ASIAEXAMPLE", "secretAccessKey": "secret/of+it", "sessionToken": "token==",
  "expiration": 7226582400000
}}"""


def login(url: str, file: Path) -> LoginKey:
    return LoginKey(url, url, "123456789012", "Reader", str(file), "ci", Route({}))


def logged_in(file: Path, token: object = "t0ken", until: object = "2199-01-01T00:00:00Z") -> Path:
    file.write_text(json.dumps({"accessToken": token, "expiresAt": until}, indent=2))
    return file


@pytest.mark.parametrize("until", ["2199-01-01T00:00:00Z", "2199-01-01T00:00:00UTC", "2199-01-01T00:00:00"])
def test_a_login_gives_the_key_of_its_role(until: str, tmp_path: Path) -> None:
    file = logged_in(tmp_path / "login.json", until=until)
    with key_service({("GET", CREDENTIALS_OF): (200, LOGIN_JSON)}) as service:
        assert login(service.url, file).fetch() == KEY
        logged_in(file, "n3xt")  # AWS's program has renewed it
        assert login(f"{service.url}/", file).fetch() == KEY
    assert [asked.headers["x-amz-sso_bearer_token"] for asked in service.asked] == ["t0ken", "n3xt"]


@pytest.mark.parametrize(
    ("status", "body", "kind", "said"),
    [
        (401, b"{}", AuthError, "AWS profile 'ci': the login has expired; run aws sso login --profile ci"),
        (403, b'{"message": "No access"}', AuthError, "(status 403): No access; check the role"),
        (404, b"<html>", AuthError, "gives no key for the role Reader in the account 123456789012"),
        (429, b"{}", ConnectError, "(status 429)"),
        (200, b"{}", AuthError, "what it gives is not a key; check AWS_ENDPOINT_URL_SSO"),
        (200, b'{"roleCredentials": []}', AuthError, "what it gives is not a key"),
        (200, LOGIN_JSON.replace(b"7226582400000", b"1"), AuthError, "the key has expired"),
        (200, LOGIN_JSON.replace(b"7226582400000", b"9" * 400), AuthError, "Expiration is not a time"),
        (200, LOGIN_JSON.replace(b'"ASIAEXAMPLE"', b"1"), AuthError, "it has no access key"),
    ],
)
def test_a_login_that_gives_no_key(
    status: int, body: bytes, kind: type[SourceError], said: str, tmp_path: Path
) -> None:
    file = logged_in(tmp_path / "login.json")
    with key_service({("GET", CREDENTIALS_OF): (status, body)}) as service:
        assert said in refused(login(service.url, file), kind)


def test_a_login_that_is_over_or_was_never_made_is_not_asked_with(tmp_path: Path) -> None:
    file = tmp_path / "login.json"
    with key_service({("GET", CREDENTIALS_OF): (200, LOGIN_JSON)}) as service:
        source = login(service.url, file)
        assert refused(source) == "AWS profile 'ci': not logged in; run aws sso login --profile ci"
        logged_in(file, until="2020-01-01T00:00:00Z")
        assert "the login has expired; run aws sso login --profile ci" in refused(source)
        for token, until in ((1, "2199-01-01T00:00:00Z"), ("t0ken", 1), ("t0ken", "later")):
            logged_in(file, token, until)
            assert "not the token of a login; run aws sso login" in refused(source)
        file.write_bytes(b"[" * 100_000)
        assert "not the token of a login" in refused(source)
        logged_in(file, "a\r\nHost: b")
        assert "characters that no token has" in refused(source)
    assert service.asked == []


# --- a container's service


def test_a_container_gets_its_key_with_its_token(tmp_path: Path) -> None:
    (file := tmp_path / "token").write_text("from a file\n")
    with key_service({("GET", "/v2/x?y=1"): (200, KEY_JSON)}) as service:
        url = f"{service.url}/v2/x?y=1"
        assert ContainerKey(url).fetch() == KEY
        assert ContainerKey(url, "as it is").fetch() == KEY
        assert ContainerKey(url, "as it is", str(file)).fetch() == KEY
    assert [asked.headers.get("authorization") for asked in service.asked] == [
        None,
        "as it is",
        "from a file",
    ]


def test_a_token_never_makes_a_header_of_its_own() -> None:
    assert "characters that no token has" in refused(ContainerKey("http://127.0.0.1", "a\r\nHost: b"))


@pytest.mark.parametrize(("status", "kind"), [(403, AuthError), (500, ConnectError), (429, ConnectError)])
def test_a_container_whose_service_refuses(status: int, kind: type[SourceError]) -> None:
    with key_service({("GET", "/"): (status, b"")}) as service:
        assert f"gives no key to this container (status {status})" in refused(
            ContainerKey(f"{service.url}/"), kind
        )


# --- a machine's metadata service


def instance(**changed: tuple[int, bytes]) -> dict[tuple[str, str], tuple[int, bytes]]:
    return {
        ("PUT", "/latest/api/token"): changed.get("token", (200, b"imds-token")),
        ("GET", CREDENTIALS): changed.get("role", (200, b"reader\n")),
        ("GET", f"{CREDENTIALS}reader"): changed.get("key", (200, KEY_JSON)),
    }


def test_a_machine_gets_the_key_of_its_role_by_a_token() -> None:
    with key_service(instance()) as service:
        assert InstanceKey(service.url, "no key").fetch() == KEY
    asked = service.asked
    assert [(each.method, each.path) for each in asked] == list(instance())
    assert asked[0].headers["x-aws-ec2-metadata-token-ttl-seconds"] == "300"
    assert [each.headers.get("x-aws-ec2-metadata-token") for each in asked] == [
        None,
        "imds-token",
        "imds-token",
    ]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"role": (404, b"")}, "no key at all; this machine has no role; set AWS_ACCESS_KEY_ID"),
        ({"role": (200, b"")}, "this machine has no role"),
        ({"role": (200, b"\xff")}, "the name of this machine's role is not text"),
        ({"token": (403, b"")}, "gives no token (status 403): no key at all"),
        ({"key": (200, b'{"Code": "AssumeRoleUnauthorizedAccess"}')}, "no key: AssumeRoleUnauthorizedAccess"),
        ({"key": (404, b"")}, "gives no key of this machine's role (status 404)"),
        ({"role": (403, b"<?xml no role")}, "does not name this machine's role (status 403)"),
        ({"key": (200, b"<html>")}, "not a key in JSON"),
    ],
)
def test_a_machine_without_a_key(changed: dict[str, tuple[int, bytes]], said: str) -> None:
    with key_service(instance(**changed)) as service:
        assert said in refused(InstanceKey(service.url, "no key at all"))


def test_a_computer_without_such_a_service_is_told_where_was_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "INSTANCE_TIMEOUT", 0.2)
    with raw_service(b"", closes=False) as url:
        text = refused(InstanceKey(url, "no key: looked here and there"))
    assert text.startswith("no key: looked here and there; no metadata service of AWS (127.0.0.1:")
    assert text.endswith("or --anonymous for a public bucket")


def test_metadata_services_are_never_asked_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with key_service(instance() | {("GET", "/c"): (200, KEY_JSON)}) as service:
        assert InstanceKey(service.url, "").fetch() == KEY
        assert ContainerKey(f"{service.url}/c").fetch() == KEY


@pytest.mark.parametrize(
    ("url", "authority"),
    [
        ("http://169.254.169.254/x", "169.254.169.254"),
        ("http://[fd00:ec2::254]/", "[fd00:ec2::254]"),
        ("https://sts.example.com:443", "sts.example.com"),
        ("https://sts.example.com:80", "sts.example.com:80"),
    ],
)
def test_the_host_is_named_as_the_service_expects(url: str, authority: str) -> None:
    assert Service.parse(url, "x").authority == authority


# --- answers that are none


@pytest.mark.parametrize(
    ("answer", "closes", "kind", "said"),
    [
        (b"SSH-2.0\r\n", True, WrongServerError, "not an answer of a service that gives out keys"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * (70 << 10), True, WrongServerError, "not an answer"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n" + b"x" * (70 << 10),
            True,
            WrongServerError,
            "not an answer",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf", True, ConnectError, "was closed before"),
        (b"", True, ConnectError, "was closed before"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://x/\r\nContent-Length: 0\r\n\r\n", True, AuthError, "302"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nha", False, ConnectError, "no answer within 0 s"),
        (b"", False, ConnectError, "no answer within 0 s"),
    ],
)
def test_answers_are_bounded_in_size_and_time(
    answer: bytes, closes: bool, kind: type[SourceError], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "CONTAINER_TIMEOUT", 20.0 if closes else 0.2)
    with raw_service(answer, closes=closes) as url:
        assert said in refused(ContainerKey(f"{url}/"), kind)


def test_a_service_that_does_not_run_may_come() -> None:
    with raw_service(b"") as url:
        pass
    assert "Connection refused" in refused(ContainerKey(f"{url}/"), ConnectError)


# --- renewed


class Changing(KeySource):
    """Gives one answer after the other. `gate`: what each fetch waits for."""

    kind = "changing"

    def __init__(self, *answers: AwsCredentials | SourceError | None) -> None:
        self.answers = list(answers)
        self.fetched = 0

    def fetch(self) -> AwsCredentials | None:
        self.fetched += 1
        answer = self.answers.pop(0)
        if isinstance(answer, SourceError):
            raise answer
        return answer


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def key_until(end: float | None) -> AwsCredentials:
    return AwsCredentials(f"until {end}", "x", None, end)


def renewed(*answers: AwsCredentials | SourceError | None) -> tuple[Changing, Clock, Renewed]:
    source, clock = Changing(*answers), Clock()
    return source, clock, Renewed(source, clock, clock)


def test_all_who_ask_at_once_get_one_key() -> None:
    source, _clock, keys_of = renewed(key_until(None))
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(keys_of.current())) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [key_until(None)] * 20
    assert source.fetched == 1


def test_who_asks_later_gets_the_next_key() -> None:
    _source, clock, keys_of = renewed(key_until(2000.0), key_until(5000.0))
    assert keys_of.current() == key_until(2000.0)
    clock.now += 900
    assert keys_of.current() == key_until(5000.0)


def test_a_key_stays_while_it_is_valid_and_no_other_is_there(caplog: pytest.LogCaptureFixture) -> None:
    source, clock, keys_of = renewed(
        key_until(2000.0), ConnectError("the service is silent"), AuthError("no more")
    )
    keys_of.current()
    clock.now = 1900.0
    assert keys_of.current() == key_until(2000.0)
    assert [record.message for record in caplog.records] == [
        "the key of the bucket was not renewed: the service is silent"
    ]
    assert keys_of.current() == key_until(2000.0)
    assert source.fetched == 2, "not asked again at once"
    clock.now = 2000.0
    with pytest.raises(AuthError, match="no more"):
        keys_of.current()
    caplog.clear()


def test_a_metadata_service_that_gave_a_key_before_is_waited_for() -> None:
    silent = NoServiceError("no key; no metadata service of AWS", ConnectError("169.254.169.254: timed out"))
    source, clock, keys_of = renewed(key_until(2000.0), silent, silent, key_until(9000.0), silent)
    keys_of.current()
    clock.now = 5000.0  # it was idle, and its key has expired
    for _ in range(2):
        with pytest.raises(ConnectError, match=r"was not renewed: 169.254.169.254: timed out") as caught:
            keys_of.current()
        assert caught.value.retryable
    assert keys_of.current() == key_until(9000.0), "a failure is not remembered"
    assert source.fetched == 4


def test_a_metadata_service_that_never_answered_is_not_there() -> None:
    silent = NoServiceError("no key; no metadata service of AWS", ConnectError("timed out"))
    _source, _clock, keys_of = renewed(silent, silent)
    for _ in range(2):
        with pytest.raises(AuthError, match="no metadata service of AWS") as caught:
            keys_of.current()
        assert not caught.value.retryable


def test_a_machine_whose_service_is_silent_after_an_idle_night_reads_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(services, "INSTANCE_TIMEOUT", 0.2)
    clock = Clock()
    with key_service(instance()) as service:
        keys_of = Renewed(InstanceKey(service.url, "no key"), clock, clock)
        assert keys_of.current() == KEY
        clock.now = END
    with pytest.raises(ConnectError, match=r"was not renewed: .*refused") as caught:
        keys_of.current()
    assert caught.value.retryable


def test_a_failure_is_for_those_who_asked_only() -> None:
    _source, _clock, keys_of = renewed(ConnectError("not yet"), None)
    with pytest.raises(ConnectError):
        keys_of.current()
    assert keys_of.current() is None
    assert keys_of.current() is None, "no key is an answer, too"


# --- the renewal of a login

RENEWED_JSON = b'{"accessToken": "n3w", "expiresIn": 3600, "refreshToken": "r3new-2", "tokenType": "Bearer"}'
RENEWABLE = {
    "clientId": "client",
    "clientSecret": "s3cret",
    "refreshToken": "r3new-1",
    "registrationExpiresAt": "2199-01-01T00:00:00Z",
    "startUrl": "https://x.awsapps.com/start",
}


def in_minutes(count: int) -> str:
    moment = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=count)
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}"


def renewable(file: Path, minutes: int, **changes: object) -> Path:
    """A login whose token ends in so many minutes."""
    found = {"accessToken": "t0ken", "expiresAt": in_minutes(minutes), **RENEWABLE, **changes}
    file.write_text(json.dumps(found))
    return file


def used(service: KeyService) -> list[str]:
    """The tokens with which keys were asked for."""
    return [asked.headers["x-amz-sso_bearer_token"] for asked in service.asked if asked.method == "GET"]


@pytest.mark.parametrize("minutes", [-60, 10])
def test_a_login_whose_token_ends_is_renewed_as_the_program_of_aws_does(minutes: int, tmp_path: Path) -> None:
    file = renewable(tmp_path / "login.json", minutes)
    answers = {("GET", CREDENTIALS_OF): (200, LOGIN_JSON), ("POST", "/token"): (200, RENEWED_JSON)}
    with key_service(answers) as service:
        assert login(service.url, file).fetch() == KEY
        assert login(service.url, file).fetch() == KEY  # with what the file has now
    assert used(service) == ["n3w", "n3w"]
    (asked,) = [asked for asked in service.asked if asked.method == "POST"]
    assert asked.headers["content-type"] == "application/json"
    assert json.loads(asked.body) == {
        "clientId": "client",
        "clientSecret": "s3cret",
        "grantType": "refresh_token",
        "refreshToken": "r3new-1",
    }
    found = json.loads(file.read_text())
    assert in_minutes(58) < found.pop("expiresAt") < in_minutes(62)
    assert found == RENEWABLE | {"accessToken": "n3w", "refreshToken": "r3new-2"}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [file]


def test_a_login_that_is_renewed_stays_its_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = renewable(tmp_path / "login.json", 10)
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "fchown", lambda _fd, uid, gid: given.append((uid, gid)))
    with key_service(
        {("GET", CREDENTIALS_OF): (200, LOGIN_JSON), ("POST", "/token"): (200, RENEWED_JSON)}
    ) as service:
        assert login(service.url, file).fetch() == KEY
    assert given == [(file.stat().st_uid, file.stat().st_gid)]
    assert used(service) == ["n3w"]


@pytest.mark.parametrize(
    ("status", "body", "kind", "said"),
    [
        (400, b'{"error": "invalid_grant"}', AuthError, "has expired; run aws sso login --profile ci"),
        (200, b"{}", AuthError, "has expired; run aws sso login --profile ci"),
        (200, b'{"accessToken": "n3w"}', AuthError, "has expired; run aws sso login --profile ci"),
        (503, b"", ConnectError, "does not renew the login (status 503)"),
    ],
)
def test_a_login_that_is_not_renewed(
    status: int, body: bytes, kind: type[SourceError], said: str, tmp_path: Path
) -> None:
    file = renewable(tmp_path / "login.json", -1)
    before = file.read_text()
    answers = {("GET", CREDENTIALS_OF): (200, LOGIN_JSON), ("POST", "/token"): (status, body)}
    with key_service(answers) as service:
        assert said in refused(login(service.url, file), kind)
        assert used(service) == []
        assert (file.read_text(), list(tmp_path.iterdir())) == (before, [file])
        renewable(file, 10)  # still valid
        assert login(service.url, file).fetch() == KEY
        assert used(service) == ["t0ken"]


@pytest.mark.parametrize(
    "changes",
    [{"refreshToken": None}, {"clientSecret": 1}, {"registrationExpiresAt": "2020-01-01T00:00:00Z"}],
    ids=str,
)
def test_a_login_that_cannot_be_renewed_is_not_tried(changes: dict[str, object], tmp_path: Path) -> None:
    file = renewable(tmp_path / "login.json", -1, **changes)
    with key_service({("POST", "/token"): (200, RENEWED_JSON)}) as service:
        assert "the login has expired; run aws sso login" in refused(login(service.url, file))
    assert service.asked == []


def test_a_login_that_another_program_renewed_meanwhile_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = renewable(tmp_path / "login.json", -1)

    def lose(*_arguments: object, **_options: object) -> Reply:
        renewable(file, 60, accessToken="theirs")
        return Reply(400, b"{}")

    monkeypatch.setattr("pbsfs.access.aws.login.ask", lose)
    with key_service({("GET", CREDENTIALS_OF): (200, LOGIN_JSON)}) as service:
        assert login(service.url, file).fetch() == KEY
    assert used(service) == ["theirs"]


@pytest.mark.parametrize("content", ["", None], ids=["cut", "gone"])
def test_a_login_that_another_program_is_writing_is_used_as_long_as_it_lasts(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = renewable(tmp_path / "login.json", 10)

    def lose(*_arguments: object, **_options: object) -> Reply:
        file.unlink()
        if content is not None:
            file.write_text(content)
        return Reply(400, b"{}")

    monkeypatch.setattr("pbsfs.access.aws.login.ask", lose)
    with key_service({("GET", CREDENTIALS_OF): (200, LOGIN_JSON)}) as service:
        assert login(service.url, file).fetch() == KEY
    assert used(service) == ["t0ken"]
