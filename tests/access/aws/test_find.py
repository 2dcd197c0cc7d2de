"""Which place gives the key: the order of AWS's tools, and what is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from pbsfs.access.aws.files import read_profile
from pbsfs.access.aws.find import find_key
from pbsfs.access.aws.keys import CommandKey, GivenKey, KeySource
from pbsfs.access.aws.services import ContainerKey, InstanceKey
from pbsfs.access.aws.sso import LoginKey
from pbsfs.access.aws.sts import RoleKey, WebIdentityKey
from pbsfs.base.errors import AuthError, PbsfsError, UsageError

KEYS = "aws_access_key_id = {0}\naws_secret_access_key = s3cret\n"
ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "AKIAENV", "AWS_SECRET_ACCESS_KEY": "s3cret"}
IDENTITY = {"AWS_WEB_IDENTITY_TOKEN_FILE": "/token", "AWS_ROLE_ARN": "arn:role"}
CONTAINER = {"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "/v2/x"}


class Home:
    def __init__(self, path: Path) -> None:
        self.path = path
        (path / ".aws").mkdir()

    def write(self, name: str, text: str, mode: int = 0o600) -> None:
        (self.path / ".aws" / name).write_text(text)
        (self.path / ".aws" / name).chmod(mode)

    def find(self, named: str | None = None, region: str | None = None, **environment: str) -> KeySource:
        given = {"HOME": str(self.path)} | environment
        return find_key(read_profile(named, given), region, given)

    def refused(
        self, kind: type[PbsfsError] = UsageError, named: str | None = None, **environment: str
    ) -> str:
        with pytest.raises(kind) as caught:
            self.find(named, **environment)
        assert "s3cret" not in str(caught.value)
        return str(caught.value)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def test_the_first_place_that_has_a_key_counts(home: Home) -> None:
    assert isinstance(home.find(), InstanceKey)
    assert isinstance(home.find(**CONTAINER), ContainerKey)
    home.write("config", f"[default]\n{KEYS.format('AKIACONFIG')}")
    found = home.find(**CONTAINER)
    assert isinstance(found, GivenKey)
    assert found.access_key == "AKIACONFIG"
    home.write("config", f"[default]\n{KEYS.format('AKIACONFIG')}credential_process = print-key\n")
    found = home.find()
    assert isinstance(found, CommandKey)
    assert found.command == "print-key"
    home.write("credentials", f"[default]\n{KEYS.format('AKIAFILE')}aws_session_token = t\n")
    found = home.find()
    assert isinstance(found, GivenKey)
    assert (found.access_key, found.secret_key, found.token) == ("AKIAFILE", "s3cret", "t")
    assert found.place == f"AWS profile 'default' in {home.path}/.aws/credentials"
    assert isinstance(home.find(**IDENTITY), WebIdentityKey)
    found = home.find(**IDENTITY, **ENVIRONMENT, AWS_SESSION_TOKEN="t0ken")
    assert isinstance(found, GivenKey)
    assert (found.place, found.access_key, found.token) == ("the environment", "AKIAENV", "t0ken")


def test_a_profile_that_an_option_names_comes_before_the_environment(home: Home) -> None:
    home.write("credentials", f"[ci]\n{KEYS.format('AKIACI')}[empty]\nregion = x\n")
    found = home.find("ci", **ENVIRONMENT, **IDENTITY)
    assert isinstance(found, GivenKey)
    assert found.access_key == "AKIACI"
    by_variable = home.find(None, **ENVIRONMENT, AWS_PROFILE="ci")
    assert isinstance(by_variable, GivenKey)
    assert by_variable.access_key == "AKIAENV"
    text = home.refused(AuthError, "empty", **ENVIRONMENT)
    assert text.startswith(f"AWS profile 'empty': no key in {home.path}/.aws/credentials and ")


def test_the_variables_have_the_forms_of_other_secrets(home: Home, tmp_path: Path) -> None:
    (tmp_path / "id").write_text("AKIAFILE\n")
    found = home.find(
        AWS_ACCESS_KEY_ID_FILE=str(tmp_path / "id"), AWS_SECRET_ACCESS_KEY_CMD="echo from a command"
    )
    assert isinstance(found, GivenKey)
    assert (found.access_key, found.secret_key) == ("AKIAFILE", "from a command")


def test_half_a_key_is_refused(home: Home) -> None:
    text = home.refused(AWS_ACCESS_KEY_ID="AKIAENV")
    assert text == "AWS_ACCESS_KEY_ID: AWS_SECRET_ACCESS_KEY is not set; set both"
    assert home.refused(AWS_WEB_IDENTITY_TOKEN_FILE="/token").endswith("AWS_ROLE_ARN is not set; set both")
    home.write("credentials", "[default]\naws_secret_access_key = s3cret\n")
    assert home.refused().endswith("AWS profile 'default' has no aws_access_key_id; add it")


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("role_arn = arn:x\nsource_profile = default\nmfa_serial = arn:mfa", "mfa_serial"),
        ("login_session = x", "login_session"),
    ],
)
def test_ways_that_take_more_name_the_program_that_has_them(setting: str, named: str, home: Home) -> None:
    home.write("config", f"[profile ci]\n{setting}\n")
    assert home.refused(UsageError, "ci") == (
        f"AWS profile 'ci': pbsfs gets no key by {named}; name a profile with credential_process = "
        "aws configure export-credentials --profile ci --format process"
    )


@pytest.mark.parametrize("mode", [0o646, 0o664, 0o620, 0o602])
@pytest.mark.parametrize("file", ["config", "credentials"])
def test_a_command_in_a_file_that_others_write_never_runs(file: str, mode: int, home: Home) -> None:
    home.write(file, "[default]\ncredential_process = print-key\n", mode)
    assert "names a command, and others can write the file; run chown and chmod go-w" in home.refused()


def test_a_file_that_others_read_is_warned_of(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    home.write("credentials", f"[default]\n{KEYS.format('AKIA')}", 0o644)
    home.find()
    assert [record.message for record in caplog.records] == [
        f"{home.path}/.aws/credentials: every user of this machine may read it; run chmod o-r on it"
    ]
    caplog.clear()


# --- the role of a profile


def role_of(found: KeySource) -> RoleKey:
    assert isinstance(found, RoleKey)
    return found


def test_a_profile_takes_the_role_with_the_key_of_another(home: Home) -> None:
    home.write("credentials", f"[base]\n{KEYS.format('AKIABASE')}")
    home.write(
        "config",
        "[profile ci]\nrole_arn = arn:aws:iam::1:role/reader\nsource_profile = base\n"
        "external_id = ext/1\nrole_session_name = backups\nduration_seconds = 3600\n",
    )
    found = role_of(home.find("ci", region="eu-west-1", https_proxy="http://proxy:3128"))
    assert (found.role, found.url) == ("arn:aws:iam::1:role/reader", "https://sts.eu-west-1.amazonaws.com")
    assert (found.region, found.session) == ("eu-west-1", "backups")
    assert (found.external_id, found.duration) == ("ext/1", 3600)
    assert found.route.proxies == {"https_proxy": "http://proxy:3128"}
    assert isinstance(found.source, GivenKey)
    assert found.source.access_key == "AKIABASE"
    assert str(found).startswith("of the role arn:aws:iam::1:role/reader, by AKIABASE of AWS profile 'base'")


def test_what_a_role_does_not_say_is_as_usual(home: Home) -> None:
    base = KEYS.format("AKIABASE")
    home.write("config", f"[default]\nrole_arn = arn:x\nsource_profile = base\n[profile base]\n{base}")
    found = role_of(home.find())
    assert (found.url, found.region) == ("https://sts.amazonaws.com", "us-east-1")
    assert (found.external_id, found.duration) == (None, None)
    assert found.session.startswith("pbsfs-")
    assert isinstance(role_of(home.find(AWS_ROLE_SESSION_NAME="of a token")).source, GivenKey)


def test_roles_may_be_taken_one_after_the_other(home: Home) -> None:
    home.write(
        "config",
        f"[profile a]\nrole_arn = arn:a\nsource_profile = b\n"
        f"[profile b]\nrole_arn = arn:b\nsource_profile = c\n"
        f"[profile c]\nrole_arn = arn:c\nsource_profile = b\n{KEYS.format('AKIAC')}",
    )
    found = role_of(home.find("a"))
    inner = role_of(found.source)
    assert (found.role, inner.role) == ("arn:a", "arn:b")
    assert isinstance(inner.source, GivenKey), "a profile's own key counts more than its role"
    assert inner.source.access_key == "AKIAC"


def test_a_profile_may_take_its_role_with_its_own_key(home: Home) -> None:
    home.write("credentials", f"[ci]\n{KEYS.format('AKIACI')}")
    home.write("config", "[profile ci]\nrole_arn = arn:x\nsource_profile = ci\n")
    found = role_of(home.find("ci"))
    assert isinstance(found.source, GivenKey)


@pytest.mark.parametrize(
    ("place", "kind"),
    [("Environment", GivenKey), ("EcsContainer", ContainerKey), ("ec2instancemetadata", InstanceKey)],
)
def test_a_role_may_be_taken_with_a_key_outside_the_files(
    place: str, kind: type[KeySource], home: Home
) -> None:
    home.write("config", f"[profile ci]\nrole_arn = arn:x\ncredential_source = {place}\n")
    assert isinstance(role_of(home.find("ci", **ENVIRONMENT, **CONTAINER)).source, kind)


ROLE = "[profile ci]\nrole_arn = arn:x\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (ROLE, "its role_arn has neither source_profile nor credential_source; set one of them"),
        (f"{ROLE}source_profile = b\ncredential_source = Environment\n", "has both source_profile and"),
        (f"{ROLE}source_profile = b\n", "AWS profile 'b': neither in "),
        (f"{ROLE}source_profile = b\n[profile b]\nregion = x\n", "source_profile 'b' has no key; add one"),
        (f"{ROLE}source_profile = ci\n", "its source_profile leads back to 'ci'; correct it"),
        (
            f"{ROLE}source_profile = b\n[profile b]\nrole_arn = arn:b\nsource_profile = ci\n",
            "AWS profile 'b': its source_profile leads back to 'ci'",
        ),
        (f"{ROLE}credential_source = Environment\n", "credential_source Environment has no key"),
        (f"{ROLE}credential_source = Elsewhere\n", "credential_source 'Elsewhere' is not known; write"),
        (f"{ROLE}source_profile = b\nexternal_id = a b\n", "external_id is not one of AWS; correct it"),
        (f"{ROLE}source_profile = b\nduration_seconds = 899\n", "duration_seconds is not valid; write a"),
        (f"{ROLE}source_profile = b\nduration_seconds = \u0663\n", "duration_seconds is not valid"),
        (f"{ROLE}source_profile = b\nrole_session_name = a b\n", "role_session_name: not a name"),
    ],
)
def test_a_role_that_cannot_be_taken_says_why(text: str, said: str, home: Home) -> None:
    home.write("config", text)
    assert said in home.refused(UsageError, "ci")


def test_a_chain_of_roles_ends(home: Home) -> None:
    links = [f"[profile p{n}]\nrole_arn = arn:x\nsource_profile = p{n + 1}\n" for n in range(5000)]
    home.write("config", "".join(links))
    assert "more than 10 roles" in home.refused(UsageError, "p0")


# --- a login

SSO = "sso_account_id = 123456789012\nsso_role_name = Reader\n"
PORTAL = "sso_start_url = https://x.awsapps.com/start\nsso_region = eu-west-1\n"


def login(found: KeySource) -> LoginKey:
    assert isinstance(found, LoginKey)
    return found


def test_a_login_is_that_of_a_session_or_of_the_profile(home: Home) -> None:
    home.write(
        "config",
        f"[profile old]\n{SSO}{PORTAL}[profile new]\nsso_session = corp\n{SSO}[sso-session corp]\n{PORTAL}"
        f"[profile role]\nrole_arn = arn:x\nsource_profile = new\n",
    )
    old, new = login(home.find("old")), login(home.find("new"))
    for found, text in ((old, "https://x.awsapps.com/start"), (new, "corp")):
        assert found.url == "https://portal.sso.eu-west-1.amazonaws.com"
        assert found.oidc_url == "https://oidc.eu-west-1.amazonaws.com"
        assert (found.account, found.role) == ("123456789012", "Reader")
        digest = hashlib.sha1(text.encode()).hexdigest()
        assert found.token_file == f"{home.path}/.aws/sso/cache/{digest}.json"
    assert isinstance(role_of(home.find("role")).source, LoginKey)
    given = home.find("old", AWS_ENDPOINT_URL_SSO="https://portal.example.com", https_proxy="http://p:1")
    assert (login(given).url, login(given).route.proxies) == (
        "https://portal.example.com",
        {"https_proxy": "http://p:1"},
    )


def test_a_session_without_a_role_is_not_for_keys(home: Home) -> None:
    home.write("config", f"[default]\nsso_session = corp\n{KEYS.format('AKIA')}")
    assert isinstance(home.find(), GivenKey)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"sso_account_id = 1\n{PORTAL}", "AWS profile 'ci': it has no sso_role_name; add it"),
        (f"sso_role_name = x\n{PORTAL}", "it has no sso_account_id; add it"),
        (SSO, "it has no sso_start_url; add it"),
        (f"{SSO}sso_start_url = https://x\n", "it has no sso_region; add it"),
        (f"{SSO}sso_session = corp\n{PORTAL}", "there is no [sso-session corp]; correct sso_session"),
        (f"{SSO}sso_start_url = x\nsso_region = a.example.com/\n", "is not the name of a region; correct it"),
    ],
)
def test_a_login_that_cannot_be_used_says_why(text: str, said: str, home: Home) -> None:
    home.write("config", f"[profile ci]\n{text}")
    assert said in home.refused(UsageError, "ci")


def test_the_token_of_a_login_goes_to_others_by_tls_only(home: Home) -> None:
    home.write("config", f"[profile ci]\n{SSO}{PORTAL}")
    text = home.refused(UsageError, "ci", AWS_ENDPOINT_URL_SSO="http://portal.example.com")
    assert text == "AWS_ENDPOINT_URL_SSO: 'portal.example.com' is not on this machine; write https://"


# --- web identity


def identity(found: KeySource) -> WebIdentityKey:
    assert isinstance(found, WebIdentityKey)
    return found


def test_the_address_of_sts_is_that_of_the_region_or_the_one_given(home: Home) -> None:
    assert identity(home.find(**IDENTITY)).url == "https://sts.amazonaws.com"
    assert identity(home.find(region="eu-west-1", **IDENTITY)).url == "https://sts.eu-west-1.amazonaws.com"
    assert identity(home.find(region="cn-north-1", **IDENTITY)).url.endswith("amazonaws.com.cn")
    given = {"AWS_ENDPOINT_URL": "https://minio", "AWS_ENDPOINT_URL_STS": "https://sts.minio"}
    assert identity(home.find(**IDENTITY, **given)).url == "https://sts.minio"


def test_a_session_has_a_name(home: Home) -> None:
    assert identity(home.find(**IDENTITY)).session.startswith("pbsfs-")
    assert identity(home.find(**IDENTITY, AWS_ROLE_SESSION_NAME="me")).session == "me"
    assert "not a name" in home.refused(UsageError, None, **IDENTITY, AWS_ROLE_SESSION_NAME="a b")


def test_a_profile_may_have_a_web_identity(home: Home) -> None:
    home.write("config", "[profile k8s]\nrole_arn = arn:x\nweb_identity_token_file = /t\n")
    found = identity(home.find("k8s"))
    assert (found.role, found.token_file) == ("arn:x", "/t")


def test_sts_is_reached_through_the_proxy_of_the_environment(home: Home) -> None:
    found = identity(home.find(**IDENTITY, https_proxy="http://proxy:3128", OTHER="x"))
    assert found.route.proxies == {"https_proxy": "http://proxy:3128"}


# --- containers and machines


def container(found: KeySource) -> ContainerKey:
    assert isinstance(found, ContainerKey)
    return found


def test_a_container_is_given_a_path_or_an_address(home: Home) -> None:
    assert container(home.find(**CONTAINER)).url == "http://169.254.170.2/v2/x"
    full = {"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://169.254.170.23/v1/credentials"}
    found = container(home.find(**full, AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE="/t"))
    assert (found.url, found.token_file) == ("http://169.254.170.23/v1/credentials", "/t")
    assert container(home.find(**full, **CONTAINER)).url == "http://169.254.170.2/v2/x"


@pytest.mark.parametrize(
    "host", ["169.254.170.2", "localhost", "127.0.0.1:51679", "[::1]:80", "[fd00:ec2::23]"]
)
def test_the_token_of_a_container_goes_to_this_machine(host: str, home: Home) -> None:
    container(home.find(AWS_CONTAINER_CREDENTIALS_FULL_URI=f"http://{host}/x"))


def test_or_to_others_by_tls_only(home: Home) -> None:
    container(home.find(AWS_CONTAINER_CREDENTIALS_FULL_URI="https://keys.example.com/x"))
    for url in ("http://keys.example.com/x", "http://192.0.2.1/", "http://169.254.170.2.example.com/"):
        text = home.refused(AWS_CONTAINER_CREDENTIALS_FULL_URI=url)
        assert "is not on this machine; such a service needs https://" in text
    for url in (
        "keys",
        "ftp://localhost/",
        "http://localhost:x/",
        "http://u@localhost/",
        "http://localhost/a b",
    ):
        assert "is not the address of a service" in home.refused(AWS_CONTAINER_CREDENTIALS_FULL_URI=url)


def test_a_machine_is_asked_at_the_usual_address_or_another(home: Home) -> None:
    def url(**environment: str) -> str:
        found = home.find(**environment)
        assert isinstance(found, InstanceKey)
        return found.url

    assert url() == "http://169.254.169.254"
    assert url(AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE="IPv6") == "http://[fd00:ec2::254]"
    assert url(AWS_EC2_METADATA_SERVICE_ENDPOINT="http://127.0.0.1:1338/") == "http://127.0.0.1:1338/"
    assert "not a mode" in home.refused(AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE="ipv5")


def test_without_any_key_the_error_says_where_was_looked(home: Home) -> None:
    text = home.refused(AuthError, AWS_EC2_METADATA_DISABLED="true")
    assert text == (
        "no key for the bucket: AWS_ACCESS_KEY_ID, AWS_WEB_IDENTITY_TOKEN_FILE and "
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI are not set; "
        f"{home.path}/.aws/credentials and {home.path}/.aws/config have none for profile default; "
        "AWS_EC2_METADATA_DISABLED is set; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give "
        "--aws-profile, --s3-config, or --anonymous for a public bucket"
    )
