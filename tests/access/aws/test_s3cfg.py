"""A server's s3.cfg: its endpoints as addresses of a bucket, and which of them a datastore has."""

from __future__ import annotations

from pathlib import Path

import pytest

from pbsfs.access.aws.s3cfg import S3Endpoint, read_endpoint
from pbsfs.base.errors import UsageError

AWS = """\
s3-endpoint: aws
\taccess-key AKIAAWS
\tendpoint {{bucket}}.s3.{{region}}.amazonaws.com
\tregion eu-central-1
\tsecret-key s3cret+/=
\tprovider-quirks skip-if-none-match-header

"""

MINIO = """\
s3-endpoint: minio
\taccess-key AKIAMINIO
\tendpoint minio.example.com
\tfingerprint ab:cd
\tpath-style true
\tport 9000
\tsecret-key s3cret
"""

DATASTORES = """\
datastore: other
\tbackend bucket=backups,client=minio,type=s3
\tpath /other

datastore: store1
\tbackend type=s3,client=aws,bucket=backups,max-cache-size=10G
\tpath /cache

datastore: local
\tpath /local
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "s3.cfg"


def test_the_only_endpoint_is_the_one(file: Path) -> None:
    file.write_text(AWS)
    file.chmod(0o640)
    assert read_endpoint(file, "backups", "store1") == S3Endpoint(
        f"{file}: s3-endpoint aws",
        "https://s3.eu-central-1.amazonaws.com",
        "eu-central-1",
        path_style=False,
        fingerprint=None,
        access_key="AKIAAWS",
        secret_key="s3cret+/=",
    )


def test_port_certificate_and_path_style_are_taken_over(file: Path) -> None:
    file.write_text(MINIO)
    file.chmod(0o644)
    found = read_endpoint(file, "backups", "store1")
    assert found.readable_by_others
    assert (found.endpoint, found.path_style) == ("https://minio.example.com:9000", True)
    assert found.fingerprint == "ab:cd"
    assert "s3cret" not in repr(found)


def test_the_region_is_that_of_the_server_if_its_file_has_none(file: Path) -> None:
    file.write_text(MINIO)
    assert read_endpoint(file, "backups", "store1").region == "us-west-1"
    file.write_text(AWS.replace("\tregion eu-central-1\n", ""))
    found = read_endpoint(file, "backups", "store1")
    assert (found.endpoint, found.region) == ("https://s3.us-west-1.amazonaws.com", "us-west-1")


def test_the_datastore_says_which_endpoint_it_has(file: Path) -> None:
    file.write_text(AWS + MINIO)
    (file.parent / "datastore.cfg").write_text(DATASTORES)
    assert read_endpoint(file, "backups", "store1").access_key == "AKIAAWS"
    assert read_endpoint(file, "backups", "other").access_key == "AKIAMINIO"


def test_several_endpoints_need_to_be_told_apart(file: Path) -> None:
    file.write_text(AWS + MINIO)
    for _ in range(2):
        with pytest.raises(UsageError, match=r"it has 2 endpoints \(aws, minio\); keep datastore.cfg"):
            read_endpoint(file, "elsewhere", "store1")
        (file.parent / "datastore.cfg").write_text(DATASTORES)


def test_a_bucket_written_into_the_endpoint_is_found(file: Path) -> None:
    file.write_text(AWS.replace("{{bucket}}", "backups"))
    assert read_endpoint(file, "backups", "store1").endpoint == "https://s3.eu-central-1.amazonaws.com"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it has no s3-endpoint; give the server's s3.cfg"),
        ("datastore: x\n\tpath /\n", "it has no s3-endpoint"),
        (AWS.replace("access-key", "key"), "s3-endpoint aws has no access-key; add it"),
        (AWS.replace("\tsecret-key s3cret+/=\n", ""), "s3-endpoint aws has no secret-key; add it"),
        (AWS.replace("{{bucket}}.", ""), "its endpoint names no bucket; set path-style true"),
        (AWS.replace("{{region}}", "{{zone}}"), "has a template that pbsfs does not know; give --endpoint"),
    ],
)
def test_a_file_that_is_none_is_refused(text: str, said: str, file: Path) -> None:
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_endpoint(file, "backups", "store1")
    assert said in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_a_file_that_is_missing_or_no_text(file: Path) -> None:
    with pytest.raises(UsageError, match="No such file or directory; check the path and who may read it"):
        read_endpoint(file, "backups", "store1")
    file.write_bytes(b"\xff")
    with pytest.raises(UsageError, match="not a configuration of a Proxmox Backup Server"):
        read_endpoint(file, "backups", "store1")
    file.write_text(AWS)
    (file.parent / "datastore.cfg").write_text(DATASTORES.replace("client=aws", "client=gone"))
    with pytest.raises(UsageError, match=r"no s3-endpoint 'gone', which datastore\.cfg names"):
        read_endpoint(file, "backups", "store1")
