"""Signatures, by the examples that AWS publishes."""

from __future__ import annotations

import calendar

import pytest

from pbsfs.sources.bucket.credentials import AwsCredentials
from pbsfs.sources.bucket.signing import query_of, signed_headers

EXAMPLE = AwsCredentials("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
THEN = calendar.timegm((2013, 5, 24, 0, 0, 0))
HOST = "examplebucket.s3.amazonaws.com"


@pytest.mark.parametrize(
    ("path", "parameters", "headers", "signature"),
    [
        (
            "/test.txt",
            {},
            {"range": "bytes=0-9"},
            "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41",
        ),
        ("/", {"lifecycle": ""}, {}, "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543"),
        (
            "/",
            {"prefix": "J", "max-keys": "2"},
            {},
            "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7",
        ),
    ],
    ids=["object", "lifecycle", "list"],
)
def test_published_examples(
    path: str, parameters: dict[str, str], headers: dict[str, str], signature: str
) -> None:
    found = signed_headers(
        path, query_of(parameters), {"host": HOST, **headers}, EXAMPLE, region="us-east-1", now=THEN
    )
    assert found["authorization"].endswith(f"Signature={signature}")
    assert found["authorization"].startswith(
        "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request, SignedHeaders="
    )


def test_the_token_of_a_temporary_key_is_sent_and_signed() -> None:
    temporary = AwsCredentials("A", "S", token="T")
    found = signed_headers("/", "", {"host": HOST}, temporary, region="auto", now=THEN)
    assert found["x-amz-security-token"] == "T"
    assert "x-amz-security-token" in found["authorization"].split("SignedHeaders=")[1]


def test_secrets_have_no_repr() -> None:
    assert "wJalr" not in repr(EXAMPLE) + str(EXAMPLE)


def test_queries_are_encoded_and_sorted() -> None:
    assert query_of({"prefix": "a/ü b", "delimiter": "/"}) == "delimiter=%2F&prefix=a%2F%C3%BC%20b"
