"""A bucket as the source of commands: what names it, its key, and what is said where something is wrong."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pbsfs.fuse.mountpoint import mounted_at
from tests.support.guides import blocks
from tests.support.keyservice import KEY_JSON, STS_XML, key_service
from tests.support.messages import is_documented
from tests.support.mounts import cleaned_up, mounted
from tests.support.needs import need, need_fuse
from tests.support.program import PBSFS, environment, error_of, output_of, pbsfs, run
from tests.support.s3 import ACCESS_KEY, BUCKET, SECRET_KEY, STORE, S3Server, Status
from tests.support.server import certificate as certificates
from tests.support.stocked import FIRST, IMAGE, Stocked
from tests.support.terminal import at_a_terminal

GUIDE = Path(__file__).parents[2] / "docs/guides/bucket.md"
NAME = f"s3://{BUCKET}/{STORE}"
END = 7226582400000
"""2199-01-01, in milliseconds."""

SHOWN = ["vm", "ct", "ns", "files"]


@dataclass(frozen=True)
class Cloud:
    """An object store with a certificate of its own CA, and a user's home directory."""

    server: S3Server
    stocked: Stocked
    home: Path
    fingerprint: str

    @property
    def endpoint(self) -> str:
        return f"https://localhost:{self.server.port}"

    def env(self, **changes: str) -> dict[str, str]:
        """An environment in which all is named but the key."""
        told = environment(HOME=str(self.home), SSL_CERT_FILE=str(self.home / "ca.pem"))
        told.pop("XDG_CONFIG_HOME", None)
        named = {"PBSFS_BUCKET": NAME, "AWS_ENDPOINT_URL_S3": self.endpoint}
        return told | {"AWS_EC2_METADATA_DISABLED": "true"} | named | changes

    def with_key(self, **changes: str) -> dict[str, str]:
        return self.env(AWS_ACCESS_KEY_ID=ACCESS_KEY, AWS_SECRET_ACCESS_KEY=SECRET_KEY, **changes)

    def write(self, name: str, text: str) -> Path:
        (file := self.home / name).parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o600)
        return file


@pytest.fixture
def cloud(stocked: Stocked, tmp_path: Path) -> Iterator[Cloud]:
    certificate = certificates.make(ca_signed=True)
    (tmp_path / "ca.pem").write_text(certificate.ca or "")
    with S3Server(stocked.path, certificate=certificate) as server:
        yield Cloud(server, stocked, tmp_path, certificate.fingerprint)


def lists(*words: str | Path, env: dict[str, str]) -> None:
    """`pbsfs ls` lists the root, and says nothing else."""
    done = pbsfs("ls", *words, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == SHOWN


def fails(*words: str | Path, env: dict[str, str], status: int) -> str:
    """The error of `pbsfs ls`, which the documents explain."""
    text = error_of(pbsfs("ls", *words, env=env), status)
    assert SECRET_KEY not in text
    assert is_documented(text, status), text
    return text


# --- what names the bucket


def test_options_name_all_of_it(cloud: Cloud) -> None:
    env = {name: value for name, value in cloud.with_key().items() if name != "AWS_ENDPOINT_URL_S3"}
    env["PBSFS_BUCKET"] = "s3://another/one"
    named = ["--bucket", NAME, "--endpoint", cloud.endpoint, "--region", "us-east-1"]
    lists(*named, "--path-style", env=env)
    del env["SSL_CERT_FILE"]
    lists(*named, "--fingerprint", cloud.fingerprint, env=env)
    lists(*named, "--ca-file", cloud.home / "ca.pem", env=env)
    assert "certificate is not trusted" in error_of(pbsfs("ls", *named, env=env), 12)


def test_variables_name_all_of_it(cloud: Cloud) -> None:
    lists(env=cloud.with_key())
    image = output_of(PBSFS, "info", IMAGE, env=cloud.with_key())
    assert "size:" in image
    assert output_of(PBSFS, "info", env=cloud.with_key())


def test_a_profile_names_all_of_it(cloud: Cloud) -> None:
    secret = cloud.write("secret", f"{SECRET_KEY}\n")
    cloud.write(
        ".config/pbsfs/config.toml",
        f'[profiles.cloud]\nbucket = "{NAME}"\nendpoint = "{cloud.endpoint}"\n'
        f'access-key = "{ACCESS_KEY}"\nsecret-key = {{ file = "{secret}" }}\n',
    )
    elsewhere = {"AWS_REGION": "elsewhere", "AWS_ENDPOINT_URL_S3": "https://nowhere.invalid"}
    env = cloud.env(PBSFS_BUCKET="s3://another/one", AWS_PROFILE="none", **elsewhere)
    lists("cloud:", env=env)
    shown = output_of(PBSFS, "config", "show", "cloud", env=env)
    assert SECRET_KEY not in shown
    assert str(secret) in shown


def test_a_missing_datastore_is_told_with_those_that_are_there(cloud: Cloud) -> None:
    there = f"there is: {NAME}"
    assert there in fails("--bucket", f"s3://{BUCKET}", env=cloud.with_key(), status=16)
    assert there in fails("--bucket", f"s3://{BUCKET}/stroe", env=cloud.with_key(), status=16)


def test_a_wrong_region_is_told_with_the_right_one(cloud: Cloud) -> None:
    text = fails("--region", "elsewhere", env=cloud.with_key(), status=4)
    assert "is in the region us-east-1, not in elsewhere; give --region us-east-1" in text


# --- the key


def test_each_place_of_a_key_is_found(cloud: Cloud) -> None:
    credentials = f"aws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
    cloud.write(".aws/credentials", f"[ci]\n{credentials}")
    lists("--aws-profile", "ci", env=cloud.env(AWS_ACCESS_KEY_ID="another", AWS_SECRET_ACCESS_KEY="x"))
    lists(env=cloud.env(AWS_PROFILE="ci"))
    printed = json.dumps({"Version": 1, "AccessKeyId": ACCESS_KEY, "SecretAccessKey": SECRET_KEY})
    program = cloud.write("print-key", f"#!/bin/sh\nenv >$HOME/seen\necho '{printed}'\n")
    program.chmod(0o700)
    cloud.write(".aws/config", f"[default]\ncredential_process = {program}\n")
    lists(env=cloud.env(PBS_PASSWORD="geheim"))
    assert "geheim" not in (cloud.home / "seen").read_text()
    secret = cloud.write("secret", f"{SECRET_KEY}\n")
    lists(env=cloud.env(AWS_ACCESS_KEY_ID=ACCESS_KEY, AWS_SECRET_ACCESS_KEY_FILE=str(secret)))


def test_a_machines_role_gives_a_temporary_key(cloud: Cloud) -> None:
    path = "/latest/meta-data/iam/security-credentials/"
    key = KEY_JSON.replace(b"ASIAEXAMPLE", ACCESS_KEY.encode()).replace(b"secret/of+it", SECRET_KEY.encode())
    answers = {
        ("PUT", "/latest/api/token"): (200, b"t"),
        ("GET", path): (200, b"reader"),
        ("GET", f"{path}reader"): (200, key),
    }
    with key_service(answers) as service:
        named = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": service.url, "http_proxy": "http://127.0.0.1:9"}
        env = cloud.env(AWS_EC2_METADATA_DISABLED="false", **named)
        lists(env=env)
        assert len(service.asked) == 3, "asked once for all requests"
        lists(env=cloud.with_key(AWS_EC2_METADATA_DISABLED="false", **named))
        assert len(service.asked) == 3, "not asked where another place has a key"
        service.answers[("GET", path)] = (404, b"")
        assert "this machine has no role" in fails(env=env, status=10)


def test_a_mount_takes_the_role_that_a_login_may_take(cloud: Cloud) -> None:
    """Both are asked again in the process of the mount, to which all of it is handed over."""
    need_fuse()
    session = "sso_account_id = 1\nsso_role_name = Base\nsso_session = corp\n"
    cloud.write(
        ".aws/config",
        f"[profile base]\n{session}[sso-session corp]\nsso_start_url = https://x\nsso_region = eu-west-1\n"
        "[profile reader]\nrole_arn = arn:aws:iam::1:role/reader\nsource_profile = base\n",
    )
    digest = hashlib.sha1(b"corp").hexdigest()
    token = {"accessToken": "of-the-login", "expiresAt": "2199-01-01T00:00:00Z"}
    cloud.write(f".aws/sso/cache/{digest}.json", json.dumps(token))
    base = {"accessKeyId": "ASIABASE", "secretAccessKey": "x", "sessionToken": "y", "expiration": END}
    taken = STS_XML.replace(b"ASIAEXAMPLE", ACCESS_KEY.encode()).replace(b"secret/of+it", SECRET_KEY.encode())
    answers = {
        ("GET", "/federation/credentials?role_name=Base&account_id=1"): (
            200,
            json.dumps({"roleCredentials": base}).encode(),
        ),
        ("POST", "/"): (200, taken),
    }
    with key_service(answers) as service:
        env = cloud.env(
            AWS_PROFILE="reader", AWS_ENDPOINT_URL_SSO=service.url, AWS_ENDPOINT_URL_STS=service.url
        )
        with mounted(env, cloud.home / "m") as mount:
            assert {path.name for path in mount.place.iterdir()} == {"vm", "ct", "ns"}
        assert [asked.method for asked in service.asked] == ["GET", "POST"]
        assert service.asked[0].headers["x-amz-sso_bearer_token"] == "of-the-login"
        assert "Credential=ASIABASE/" in service.asked[1].headers["authorization"]
        cloud.write(
            f".aws/sso/cache/{digest}.json", json.dumps(token | {"expiresAt": "2020-01-01T00:00:00Z"})
        )
        assert "the login has expired; run aws sso login --profile base" in fails(env=env, status=10)


def test_a_servers_configuration_gives_it(cloud: Cloud) -> None:
    file = cloud.write(
        "s3.cfg",
        f"s3-endpoint: local\n\taccess-key {ACCESS_KEY}\n\tendpoint localhost\n\tport {cloud.server.port}\n"
        f"\tpath-style true\n\tregion us-east-1\n\tfingerprint {cloud.fingerprint}\n"
        f"\tsecret-key {SECRET_KEY}\n",
    )
    env = cloud.env()
    for name in ("AWS_ENDPOINT_URL_S3", "SSL_CERT_FILE"):
        del env[name]
    lists("--s3-config", file, env=env)


def test_a_public_bucket_needs_none(stocked: Stocked, tmp_path: Path) -> None:
    with S3Server(stocked.path, public=True) as server:
        env = environment(HOME=str(tmp_path), PBSFS_BUCKET=NAME)
        done = pbsfs("ls", "--anonymous", "--endpoint", f"http://127.0.0.1:{server.port}", env=env)
    assert (done.returncode, done.stdout.split()) == (0, SHOWN)
    assert re.fullmatch(r".*has no TLS: others on the network can read and change.*\n", done.stderr)


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({}, 10, "no key for the bucket: AWS_ACCESS_KEY_ID, "),
        ({"AWS_ACCESS_KEY_ID": ACCESS_KEY}, 2, "AWS_SECRET_ACCESS_KEY is not set; set both"),
        (
            {"AWS_ACCESS_KEY_ID": "AKIAOTHER", "AWS_SECRET_ACCESS_KEY": "x"},
            10,
            "does not know the access key",
        ),
        (
            {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": "x"},
            10,
            "does not accept the signature",
        ),
        ({"AWS_PROFILE": "none"}, 2, "AWS profile 'none': neither in "),
        (
            {"PBSFS_BUCKET": "backups/store"},
            2,
            "'backups/store' is not a bucket; write s3://BUCKET/DATASTORE",
        ),
        ({"AWS_ENDPOINT_URL_S3": "ftp://x"}, 2, "'ftp://x' is not an endpoint"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(
    cloud: Cloud, changes: dict[str, str], status: int, said: str
) -> None:
    assert said in fails(env=cloud.env(**changes), status=status)


# --- mounts and block devices


@pytest.mark.mount
def test_a_mount_has_the_key_and_its_paths_name_the_bucket(cloud: Cloud) -> None:
    need_fuse()
    with mounted(cloud.with_key(), cloud.home / "m") as mount:
        place = mount.place
        assert {path.name for path in place.iterdir()} == {"vm", "ct", "ns"}
        for name in ("cmdline", "environ"):
            assert SECRET_KEY.encode() not in Path(f"/proc/{mount.pid}/{name}").read_bytes()
        named = json.loads(output_of("getfattr", "--only-values", "-n", "user.pbs.source", place))
        assert named == {
            "bucket": NAME,
            "endpoint": cloud.endpoint,
            "region": "us-east-1",
            "path_style": "true",
            "namespace": "",
            "subtree": "",
        }
        assert os.statvfs(place).f_blocks == 0
        env = cloud.with_key()
        for name in ("PBSFS_BUCKET", "AWS_ENDPOINT_URL_S3"):
            del env[name]
        done = pbsfs("ls", place / "vm", env=env)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.split() == [path.name for path in sorted(cloud.stocked.path.glob("vm/*"))]
        assert re.search(f"^mount +{place} +{NAME} ", pbsfs("status", env=env).stdout, re.MULTILINE)


def test_nbdkit_reads_from_it(cloud: Cloud) -> None:
    need("nbdkit", "nbdinfo")
    words = [f"bucket={NAME}", f"endpoint={cloud.endpoint}", f"path={IMAGE}"]
    env = cloud.with_key()
    for name in ("PBSFS_BUCKET", "AWS_ENDPOINT_URL_S3"):
        del env[name]
    plugin = Path(__file__).parents[2] / "nbd_bridge.py"
    command = ["nbdkit", "-U", "-", "python", str(plugin), *words, "--run", "nbdinfo --size $uri"]
    assert int(output_of(*command, env=env)) > 0


@pytest.mark.mount
def test_a_line_of_fstab_has_all_that_a_bucket_needs(cloud: Cloud) -> None:
    need_fuse()
    files = {name: cloud.write(name, f"{text}\n") for name, text in (("i", ACCESS_KEY), ("s", SECRET_KEY))}
    options = f"rw,endpoint={cloud.endpoint},region=us-east-1,path-style,ca-file={cloud.home}/ca.pem"
    options += f",access-key-file={files['i']},secret-key-file={files['s']}"
    env = cloud.env(PBSFS_BUCKET="s3://another/one", AWS_ENDPOINT_URL_S3="https://nowhere.invalid")
    del env["SSL_CERT_FILE"]
    (place := cloud.home / "m").mkdir()
    helper = [sys.executable, "-c", "from pbsfs.cli.mount_helper import main; main()"]
    with cleaned_up(place):
        done = run([*helper, f"{NAME}:vm", place, "-o", options], env=env)
        assert (done.returncode, done.stderr) == (0, "")
        assert {path.name for path in place.iterdir()} == {
            path.name for path in cloud.stocked.path.glob("vm/*")
        }
        mount = mounted_at(place)
        assert mount is not None
        assert mount.source == f"{NAME}:vm"


# --- config


def test_check_goes_through_the_steps_of_a_bucket(cloud: Cloud) -> None:
    secret = cloud.write("secret", f"{SECRET_KEY}\n")
    text = (
        f'[profiles.cloud]\nbucket = "{NAME}"\nendpoint = "{cloud.endpoint}"\n'
        f'access-key = "{ACCESS_KEY}"\nsecret-key = {{ file = "{secret}" }}\n'
    )
    cloud.write(".config/pbsfs/config.toml", text)
    shown = output_of(PBSFS, "config", "check", "cloud", env=cloud.env())
    found = [re.split(r"\s+", line, maxsplit=2) for line in shown.splitlines()]
    assert [step[:2] for step in found] == [
        *(["ok", f"{step}:"] for step in ("file", "profile", "source", "name", "connection")),
        *(["ok", f"{step}:"] for step in ("certificate", "access-key", "keys", "access-key", "backups")),
        ["warning", "keys:"],
    ]
    texts = {step: text for _mark, step, text in found}
    assert texts["source:"] == f"{NAME} at localhost:{cloud.server.port}, no region"
    assert f"ok      access-key:   {ACCESS_KEY} of file {secret}\n" in shown
    assert SECRET_KEY not in shown
    for old, new, status, step in (
        (ACCESS_KEY, "AKIAOTHER", 10, "access-key"),
        (f'{STORE}"', 'other"', 16, "datastore"),
        ("localhost", "nowhere.invalid", 13, "name"),
        (str(secret), "/nowhere", 2, "access-key"),
    ):
        cloud.write(".config/pbsfs/config.toml", text.replace(old, new))
        done = pbsfs("config", "check", "cloud", env=cloud.env())
        assert done.returncode == status, done.stdout
        assert done.stdout.splitlines()[-1].split()[:2] == ["FAILED", f"{step}:"]


def test_check_warns_of_a_bucket_without_tls(stocked: Stocked, tmp_path: Path) -> None:
    (file := tmp_path / ".config/pbsfs/config.toml").parent.mkdir(parents=True)
    with S3Server(stocked.path, public=True) as server:
        file.write_text(
            f'[profiles.default]\nbucket = "{NAME}"\nendpoint = "http://127.0.0.1:{server.port}"\n'
            "anonymous = true\n"
        )
        env = environment(HOME=str(tmp_path))
        env.pop("XDG_CONFIG_HOME", None)
        shown = output_of(PBSFS, "config", "check", env=env)
    assert "\nwarning certificate:  none: others on the network can read along\n" in shown
    assert "\nok      access-key:   not needed: requests are anonymous\n" in shown


def test_init_asks_for_a_bucket(cloud: Cloud) -> None:
    answers = [
        ("or s3://BUCKET/DATASTORE: ", NAME),
        ("(empty for AWS): ", cloud.endpoint),
        ("or us-east-1): ", ""),
        ("as AWS's tools do): ", ACCESS_KEY),
        ("or let a command print it (file, command) [file]: ", "file"),
        (f"secret key of {ACCESS_KEY}: ", SECRET_KEY),
        ("root namespace): ", ""),
        ("(empty for none): ", ""),
    ]
    status, shown = at_a_terminal([PBSFS, "config", "init", "cloud"], answers, cloud.env())
    assert status == 0, shown
    assert SECRET_KEY not in shown
    env = cloud.env()
    for name in ("PBSFS_BUCKET", "AWS_ENDPOINT_URL_S3"):
        del env[name]
    lists("cloud:", env=env)


def test_an_object_store_with_a_certificate_of_its_own_is_asked_about_once(cloud: Cloud) -> None:
    env = cloud.with_key()
    del env["SSL_CERT_FILE"]
    question = "Is that what its administrator shows? Connect, and remember it [y/N]: "
    status, shown = at_a_terminal([PBSFS, "ls"], [(question, "y")], env)
    assert (status, shown.split()[-4:]) == (0, SHOWN)
    assert cloud.fingerprint.upper() in shown.upper()
    lists(env=env)
    cloud.server.drop_connections()
    assert "certificate is not trusted" in fails(env=env | {"HOME": "/nowhere"}, status=12)


# --- rights


def test_the_rights_in_the_guide_are_enough_for_all_that_pbsfs_asks(cloud: Cloud) -> None:
    (text,) = [block.text for block in blocks(GUIDE.read_text()) if block.language == "json"]
    policy = json.loads(text.replace("store1", STORE).replace("backups", BUCKET))

    def allows(action: str, resource: str, prefix: str | None) -> bool:
        """By the rules of AWS: some statement has the action, the resource and all conditions."""
        return any(
            statement["Action"] == action
            and fnmatch.fnmatchcase(resource, statement["Resource"])
            and all(
                prefix is not None and fnmatch.fnmatchcase(prefix, pattern)
                for pattern in statement.get("Condition", {}).get("StringLike", {}).values()
            )
            for statement in policy["Statement"]
        )

    env = cloud.with_key()
    output_of(PBSFS, "ls", "vm", env=env)
    output_of(PBSFS, "info", env=env)
    run([PBSFS, "verify", FIRST], env=env)
    output_of(PBSFS, "export", IMAGE, cloud.home / "disk.img", env=env)
    kinds = set()
    for asked in cloud.server.requests:
        method, _space, name = asked.partition(" ")
        kinds.add(method)
        if method == "LIST":
            assert allows("s3:ListBucket", f"arn:aws:s3:::{BUCKET}", name), asked
        else:
            assert allows("s3:GetObject", f"arn:aws:s3:::{BUCKET}/{name}", None), asked
    assert kinds >= {"LIST", "GET"}
    assert not allows("s3:ListBucket", f"arn:aws:s3:::{BUCKET}", "")
    assert not allows("s3:GetObject", f"arn:aws:s3:::{BUCKET}/other/.cnt/x", None)


def test_what_a_key_may_not_read_is_told_with_the_rights_it_needs(cloud: Cloud) -> None:
    cloud.server.fail("LIST", *[Status(403, "AccessDenied")] * 20)
    text = fails(env=cloud.with_key(), status=11)
    assert f"allow the access key s3:ListBucket on the bucket '{BUCKET}' and s3:GetObject" in text


# --- a cache on disk


def test_a_cache_on_disk_stands_in_front_of_a_bucket(cloud: Cloud, stocked: Stocked, tmp_path: Path) -> None:
    env = cloud.with_key() | {"PBSFS_CACHE_DIR": str(tmp_path / "cache")}
    output_of(PBSFS, "cache", "warm", FIRST, env=env)
    fetched = [what for what in cloud.server.requests if "/.chunks/" in what]
    assert len(fetched) == len(set(fetched)) > 1
    output_of(PBSFS, "export", IMAGE, tmp_path / "first", env=env)
    assert [what for what in cloud.server.requests if "/.chunks/" in what] == fetched
    asked = len(cloud.server.requests)
    keyless = {name: value for name, value in env.items() if "KEY" not in name}
    output_of(PBSFS, "export", "--offline", IMAGE, tmp_path / "second", env=keyless)
    assert len(cloud.server.requests) == asked
    for name in ("first", "second"):
        assert (tmp_path / name).read_bytes() == stocked.contents[IMAGE]
