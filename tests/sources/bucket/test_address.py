"""What users write for a bucket, and the requests that follow from it."""

from __future__ import annotations

import pytest

from pbsfs.base.errors import UsageError
from pbsfs.sources.bucket.address import BucketAddress


def test_a_bucket_of_aws_is_in_the_name_of_the_host() -> None:
    address = BucketAddress.parse("s3://backups/store1", region="eu-central-1")
    assert (address.bucket, address.store) == ("backups", "store1")
    assert address.authority == "backups.s3.eu-central-1.amazonaws.com"
    assert (address.port, address.secure) == (443, True)
    assert address.path("store1/.cnt/vm/1/2025-07-14T14:20:02Z/a b") == (
        "/store1/.cnt/vm/1/2025-07-14T14%3A20%3A02Z/a%20b"
    )
    assert address.path() == "/"
    assert str(address) == "s3://backups/store1"


def test_a_bucket_of_another_endpoint_is_in_the_path() -> None:
    address = BucketAddress.parse("s3://backups/a/store1/", endpoint="minio.lan:9000")
    assert address.store == "a/store1"
    assert address.authority == "minio.lan:9000"
    assert address.endpoint == "https://minio.lan:9000"
    assert address.path("a/store1/.cnt/") == "/backups/a/store1/.cnt/"
    assert address.path() == "/backups"


def test_the_style_can_be_chosen() -> None:
    given = BucketAddress.parse("s3://backups/s", endpoint="https://s3.example.com", path_style=False)
    assert (given.authority, given.path("s/x")) == ("backups.s3.example.com", "/s/x")
    dotted = BucketAddress.parse("s3://back.ups/s")
    assert (dotted.authority, dotted.path("s/x")) == ("s3.us-east-1.amazonaws.com", "/back.ups/s/x")


def test_an_ipv6_address_has_brackets_in_the_host_header_only() -> None:
    address = BucketAddress.parse("s3://backups/s", endpoint="http://[::1]:9000")
    assert (address.host, address.authority, address.secure) == ("::1", "[::1]:9000", False)


@pytest.mark.parametrize(
    "text",
    [
        "backups/store",
        "s3://",
        "s3://A/s",
        "s3://ab/s",
        "s3://bucket/../s",
        "s3://bucket/a//s",
        "s3://bucket/\n",
    ],
)
def test_what_is_not_a_bucket_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="write s3://BUCKET/DATASTORE"):
        BucketAddress.parse(text)


@pytest.mark.parametrize(
    "endpoint",
    ["ftp://a", "https://", "https://a/b", "https://a?x", "https://a:0", "https://a:x", "https://a b"],
)
def test_what_is_not_an_endpoint_is_refused(endpoint: str) -> None:
    with pytest.raises(UsageError, match="is not an endpoint"):
        BucketAddress.parse("s3://bucket/s", endpoint=endpoint)


def test_a_secret_in_an_endpoint_is_not_shown() -> None:
    with pytest.raises(UsageError) as caught:
        BucketAddress.parse("s3://bucket/s", endpoint="https://key:geheim@a")
    assert "geheim" not in str(caught.value)
    with pytest.raises(UsageError) as caught:
        BucketAddress.parse("s3://bucket/s", endpoint="https://key:geheim@a:99999")
    assert "geheim" not in str(caught.value)


def test_a_region_in_china_has_addresses_of_its_own() -> None:
    address = BucketAddress.parse("s3://backups/store1", region="cn-north-1")
    assert address.authority == "backups.s3.cn-north-1.amazonaws.com.cn"


@pytest.mark.parametrize("region", ["", "eu/central", "a b", ".example.com", "x\r\ny", "x" * 64])
def test_what_is_not_a_region_is_refused(region: str) -> None:
    with pytest.raises(UsageError, match="is not the name of a region"):
        BucketAddress.parse("s3://backups/store1", region=region)
