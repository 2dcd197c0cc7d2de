"""A bucket as a source: what names it, its address, certificate and key, and what takes precedence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pbsfs.access.aws.keys import GivenKey
from pbsfs.access.aws.sts import WebIdentityKey
from pbsfs.access.config import configure, source_of, with_secrets
from pbsfs.access.credentials import take_secrets
from pbsfs.access.description import BucketAccess, Description, ServerAccess
from pbsfs.access.options import SourceOptions, named_by, names_source, resolve, shown_source
from pbsfs.access.resolve import describe
from pbsfs.base.errors import PbsfsError, UsageError
from pbsfs.sources.bucket.address import BucketAddress
from pbsfs.sources.bucket.source import BucketSource
from pbsfs.sources.http.tls import Trust
from tests.access.files import Files
from tests.support.server import certificate as certificates

BUCKET = "s3://backups/store1"
KEYS = {"AWS_ACCESS_KEY_ID": "AKIAENV", "AWS_SECRET_ACCESS_KEY": "s3cret"}
PINNED = "ab" * 32


def described(home: Path, environment: dict[str, str] | None = None, **options: Any) -> Description:
    variables = {"HOME": str(home), **KEYS, **(environment or {})}
    return describe(resolve(SourceOptions(**options), variables), variables, None)


def access(home: Path, environment: dict[str, str] | None = None, **options: Any) -> BucketAccess:
    found = described(home, environment, **({"bucket": BUCKET} | options)).access
    assert isinstance(found, BucketAccess)
    return found


def refused(home: Path, environment: dict[str, str] | None = None, **options: Any) -> str:
    with pytest.raises(PbsfsError) as caught:
        access(home, environment, **options)
    assert "s3cret" not in str(caught.value)
    return str(caught.value)


# --- what names a bucket


def test_a_bucket_is_a_source(tmp_path: Path) -> None:
    found = access(tmp_path)
    source = found.open()
    assert isinstance(source, BucketSource)
    assert str(source) == BUCKET
    assert found.address == BucketAddress("backups", "store1")
    assert found.trust == Trust()
    key = found.key
    assert isinstance(key, GivenKey)
    assert (key.access_key, key.secret_key) == ("AKIAENV", "s3cret")
    assert "s3cret" not in repr(found)


def test_a_variable_names_it_unless_an_option_names_another_source(tmp_path: Path) -> None:
    named = {"PBSFS_BUCKET": BUCKET, "PBS_REPOSITORY": "host:store"}
    assert names_source(named)
    assert str(access(tmp_path, named, bucket=None).address) == BUCKET
    server = resolve(SourceOptions(repository="other:store"), named)
    assert (server.bucket, server.repository) == (None, "root@pam@other:8007:store")
    directory = resolve(SourceOptions(), named | {"PBSFS_DATASTORE_DIR": str(tmp_path)})
    assert (directory.bucket, directory.datastore_dir) == (None, tmp_path)


def test_a_bucket_excludes_other_sources() -> None:
    with pytest.raises(UsageError, match="--repository and --bucket exclude each other"):
        resolve(SourceOptions(bucket=BUCKET, repository="host:store"), {})


@pytest.mark.parametrize("text", ["backups/store1", "s3:/backups", "s3://B/store", "s3://backups/../x", ""])
def test_what_is_not_a_bucket_is_refused(text: str, tmp_path: Path) -> None:
    assert "write s3://BUCKET/DATASTORE" in refused(tmp_path, bucket=text)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"endpoint": "https://x"}, "--endpoint is for a bucket; leave it out, or give --bucket"),
        ({"path_style": False}, "--path-style is for a bucket"),
        ({"aws_profile": "x"}, "--aws-profile is for a bucket"),
    ],
)
def test_options_of_buckets_are_refused_for_others(options: dict[str, Any], said: str) -> None:
    for source in ({"repository": "host:store"}, {"datastore_dir": Path("/srv")}):
        with pytest.raises(UsageError) as caught:
            resolve(SourceOptions(**source, **options), {})
        assert said in str(caught.value)


def test_ways_to_a_key_or_a_certificate_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="--anonymous and --aws-profile exclude each other"):
        resolve(SourceOptions(bucket=BUCKET, anonymous=True, aws_profile="x"), {})
    with pytest.raises(UsageError, match="--fingerprint and --ca-file exclude each other"):
        resolve(SourceOptions(bucket=BUCKET, fingerprint=PINNED, ca_file=Path("/ca")), {})


def test_a_place_of_fstab_may_be_a_bucket_with_a_path() -> None:
    assert source_of(BUCKET, {}) == (SourceOptions(bucket=BUCKET), "")
    assert source_of(f"{BUCKET}:files/vm/100/", {}) == (SourceOptions(bucket=BUCKET), "files/vm/100")


# --- its address


def test_options_come_before_variables_and_those_before_files(tmp_path: Path) -> None:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/config").write_text(
        "[default]\nregion = of-file\nendpoint_url = https://file\ns3 =\n  addressing_style = virtual\n"
    )
    assert access(tmp_path).address == BucketAddress("backups", "store1", "https://file", "of-file", False)
    variables = {"AWS_DEFAULT_REGION": "of-default", "AWS_ENDPOINT_URL": "https://any"}
    found = access(tmp_path, variables).address
    assert (found.region, found.endpoint) == ("of-default", "https://any")
    variables |= {"AWS_REGION": "of-variable", "AWS_ENDPOINT_URL_S3": "https://s3:9000"}
    found = access(tmp_path, variables).address
    assert (found.region, found.endpoint) == ("of-variable", "https://s3:9000")
    found = access(tmp_path, variables, endpoint="http://here:80", region="r", path_style=True).address
    assert found == BucketAddress("backups", "store1", "http://here:80", "r", True)
    ignoring = variables | {"AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"}
    assert access(tmp_path, ignoring).address.endpoint is None


def test_a_proxy_of_the_environment_is_used_for_tls(tmp_path: Path) -> None:
    variables = {"HTTPS_PROXY": "http://proxy:3128"}
    found = access(tmp_path, variables).proxy
    assert found is not None
    assert found.address == "proxy:3128"
    assert access(tmp_path, variables, endpoint="http://127.0.0.1:9000").proxy is None


# --- its certificate


def test_a_fingerprint_or_a_ca_is_trusted(tmp_path: Path) -> None:
    (ca := tmp_path / "ca.pem").write_text(certificates.make(ca_signed=True).ca or "")
    assert access(tmp_path, fingerprint=PINNED).trust == Trust(pinned=PINNED)
    trusted = Trust(ca=ca.read_text().strip())
    assert access(tmp_path, ca_file=ca).trust == trusted
    bundle = {"AWS_CA_BUNDLE": str(ca)}
    assert access(tmp_path, bundle).trust == trusted
    identity = {"AWS_WEB_IDENTITY_TOKEN_FILE": "/t", "AWS_ROLE_ARN": "r", "AWS_ACCESS_KEY_ID": ""}
    key = access(tmp_path, bundle | identity).key
    assert isinstance(key, WebIdentityKey)
    assert key.route.ca == trusted.ca
    assert access(tmp_path, {"AWS_CA_BUNDLE": str(ca)}, fingerprint=PINNED).trust == Trust(pinned=PINNED)
    assert access(tmp_path, {"PBS_FINGERPRINT": PINNED}).trust == Trust(), "it is a server's"


def test_without_tls_a_certificate_makes_no_sense(tmp_path: Path) -> None:
    text = refused(tmp_path, endpoint="http://127.0.0.1:9000", fingerprint=PINNED)
    assert text.startswith("http://127.0.0.1:9000: an http:// endpoint has no certificate; write https://")


def test_a_ca_of_the_command_line_comes_before_a_fingerprint_of_the_environment(tmp_path: Path) -> None:
    (ca := tmp_path / "ca.pem").write_text(certificates.make(ca_signed=True).ca or "")
    variables = {"PBS_FINGERPRINT": PINNED, "PBS_PASSWORD": "x"}
    found = described(tmp_path, variables, repository="host:store", ca_file=ca).access
    assert isinstance(found, ServerAccess)
    assert found.trust.pinned is None
    assert found.trust.ca


# --- its key


def test_anonymous_needs_no_key(tmp_path: Path) -> None:
    assert access(tmp_path, anonymous=True).key.kind == "none"


def test_a_servers_configuration_has_address_certificate_and_key(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (file := tmp_path / "s3.cfg").write_text(
        "s3-endpoint: minio\n\taccess-key AKIACFG\n\tsecret-key s3cret\n\tendpoint minio.example.com\n"
        f"\tpath-style true\n\tport 9000\n\tregion garage\n\tfingerprint {PINNED}\n"
    )
    variables = {"AWS_REGION": "other", "AWS_ENDPOINT_URL": "https://other"}
    file.chmod(0o644)
    found = access(tmp_path, variables, s3_config=file)
    assert caplog.messages == [f"{file}: every user of this machine may read it; run chmod o-r on it"]
    caplog.clear()
    file.chmod(0o640)
    expected = BucketAddress("backups", "store1", "https://minio.example.com:9000", "garage", True)
    assert (found.address, found.trust) == (expected, Trust(pinned=PINNED))
    assert isinstance(found.key, GivenKey)
    assert found.key.access_key == "AKIACFG"
    found = access(tmp_path, s3_config=file, endpoint="http://127.0.0.1:9000")
    assert found.trust == Trust(), "the certificate is that of another address"


def test_no_process_that_pbsfs_starts_inherits_a_key() -> None:
    given = KEYS | {
        "AWS_SESSION_TOKEN_FILE": "/token",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN": "s3cret",
        "AWS_PROFILE": "kept",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": "/run/token",
    }
    environment = dict(given)
    assert take_secrets(environment) == given
    assert environment.keys() <= {"AWS_PROFILE", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"}


# --- profiles of the configuration

PROFILE = f"""
[profiles.home]
bucket = "{BUCKET}"
endpoint = "https://s3.example.com"
region = "garage"
path-style = false
fingerprint = "{PINNED}"
access-key = "AKIAPROFILE"
secret-key = {{ file = "SECRET" }}
namespace = "prod"
"""


@pytest.fixture
def profile(files: Files, tmp_path: Path) -> Files:
    (secret := tmp_path / "secret").write_text("of a profile\n")
    secret.chmod(0o600)
    files.write(PROFILE.replace("SECRET", str(secret)))
    files.environment |= {"HOME": str(tmp_path)}
    return files


def of_profile(profile: Files, given: SourceOptions | None = None, **environment: str) -> BucketAccess:
    variables = profile.environment | environment
    configured = configure(given or SourceOptions(profile="home"), variables)
    options = resolve(configured.options, configured.environment)
    found = describe(options, configured.environment, None).access
    assert isinstance(found, BucketAccess)
    return found


def test_a_profile_has_all_of_it_and_comes_before_variables_of_other_tools(profile: Files) -> None:
    variables = KEYS | {"AWS_REGION": "other", "AWS_ENDPOINT_URL": "https://other", "PBS_FINGERPRINT": "x"}
    found = of_profile(profile, None, **variables)
    assert found.address == BucketAddress("backups", "store1", "https://s3.example.com", "garage", False)
    assert found.trust == Trust(pinned=PINNED)
    assert isinstance(found.key, GivenKey)
    assert (found.key.access_key, found.key.secret_key) == ("AKIAPROFILE", "of a profile")


def test_a_profile_with_a_key_is_complete_without_variables_and_files_of_other_tools(
    profile: Files, tmp_path: Path
) -> None:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/config").write_text("this is not a file of AWS's tools")
    text = (profile.user / "config.toml").read_text()
    profile.write(text.replace('endpoint = "https://s3.example.com"\nregion = "garage"\n', ""))
    found = of_profile(profile, AWS_ENDPOINT_URL="https://other", AWS_REGION="other", AWS_PROFILE="none")
    assert (found.address.url, found.address.region) == ("https://s3.us-east-1.amazonaws.com", None)
    with pytest.raises(UsageError, match=r"line 1 is in no \[profile\]"):
        access(tmp_path)
    assert access(tmp_path, {"AWS_REGION": "r"}, anonymous=True).address.region == "r"


def test_options_come_before_a_profile(profile: Files) -> None:
    given = SourceOptions(profile="home", endpoint="https://here", path_style=True, anonymous=True)
    found = of_profile(profile, given)
    assert (found.address.endpoint, found.address.path_style) == ("https://here", True)
    assert found.key.kind == "none"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("bucket =", 'repository = "host:store"\nbucket =', "repository and bucket exclude each other"),
        (f'bucket = "{BUCKET}"', 'repository = "host:store"', "endpoint is for a bucket; leave it out"),
        (f'bucket = "{BUCKET}"', 'bucket = "backups"', "profiles.home.bucket: 'backups' is not a bucket"),
        ("https://s3.example.com", "ftp://x", "profiles.home.endpoint: 'ftp://x' is not an endpoint"),
        ("path-style = false", 'path-style = "no"', "not true or false"),
        ('access-key = "AKIAPROFILE"\n', "", "access-key and secret-key belong together; give both"),
        ("path-style = false", "anonymous = true", "anonymous and secret-key exclude each other"),
        ("path-style = false", "endpoint-url = 'x'", "unknown key 'endpoint-url'; did you mean endpoint?"),
        ('region = "garage"', 'region = ""', "profiles.home.region: '' is not the name of a region"),
        ("path-style = false", "password = { file = '/x' }", "a bucket has no password"),
    ],
)
def test_a_profile_that_makes_no_sense_is_refused(old: str, new: str, said: str, files: Files) -> None:
    text = PROFILE.replace("SECRET", "/secret")
    assert old in text
    files.write(text.replace(old, new))
    assert said in files.refused()


def test_a_secret_key_is_never_text_in_the_configuration(files: Files) -> None:
    files.write(PROFILE.replace('{ file = "SECRET" }', '"s3cret"'))
    text = files.refused()
    assert "profiles.home.secret-key: a secret does not belong in this file" in text
    assert "s3cret" not in text


# --- mounts


def test_a_mount_names_its_bucket_without_secrets(tmp_path: Path) -> None:
    description = described(
        tmp_path, bucket=BUCKET, endpoint="https://s3", region="r", path_style=True, fingerprint=PINNED
    )
    shown = shown_source(description, "files")
    assert b"s3cret" not in shown
    assert b"AKIAENV" not in shown
    assert named_by(shown) == (
        SourceOptions(
            bucket=BUCKET,
            endpoint="https://s3",
            region="r",
            path_style=True,
            fingerprint=PINNED,
            namespace="",
        ),
        "files",
    )
    anonymous = described(tmp_path, bucket=BUCKET, anonymous=True)
    assert named_by(shown_source(anonymous))[0].anonymous


def test_a_mount_of_a_bucket_of_aws_names_all_of_its_address(tmp_path: Path) -> None:
    described_first = described(tmp_path, bucket=BUCKET, region="eu-central-1")
    options = named_by(shown_source(described_first))[0]
    variables = {"AWS_ENDPOINT_URL_S3": "https://elsewhere", "AWS_REGION": "elsewhere"}
    given = {"HOME": str(tmp_path)} | KEYS | variables
    found = describe(resolve(options, given), given, None).access
    assert isinstance(found, BucketAccess)
    assert found.address.authority == "backups.s3.eu-central-1.amazonaws.com"
    assert found.address.signing_region == "eu-central-1"


def test_a_path_in_a_mount_gets_the_key_of_the_profile_with_its_bucket(profile: Files) -> None:
    mounted = SourceOptions(bucket=BUCKET, namespace="")
    found = with_secrets(mounted, profile.environment)
    assert (found.bucket, found.access_key, found.namespace) == (BUCKET, "AKIAPROFILE", "")
    other = replace(mounted, bucket="s3://backups/other")
    assert with_secrets(other, profile.environment) == other
