"""Checks the signature of a request as it was received: AWS Signature Version 4, from the server's side.

Written from AWS's description and not from pbsfs's code, which it tests.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping

_AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=(?P<key>[^/]+)/(?P<date>\d{8})/(?P<region>[^/]+)/s3/aws4_request, "
    r"SignedHeaders=(?P<names>[a-z0-9;-]+), Signature=(?P<signature>[0-9a-f]{64})"
)


def refused(
    method: str, target: str, headers: Mapping[str, str], access_key: str, secret_key: str, region: str
) -> str | None:
    """The code of the error for a request that is not signed as it has to be; None if it is.

    `target`: path and query as received. `headers`: names in lower case.
    """
    found = _AUTHORIZATION.fullmatch(headers.get("authorization", ""))
    if found is None:
        return "AccessDenied"
    if found["key"] != access_key:
        return "InvalidAccessKeyId"
    if found["region"] != region:
        return "AuthorizationHeaderMalformed"
    path, _question, query = target.partition("?")
    names = found["names"].split(";")
    if not {"host", "x-amz-content-sha256", "x-amz-date"} <= set(names):
        return "AccessDenied"
    canonical = "\n".join(
        [
            method,
            path,
            "&".join(sorted(pair if "=" in pair else f"{pair}=" for pair in query.split("&")))
            if query
            else "",
            *(f"{name}:{' '.join(headers.get(name, '').split())}" for name in names),
            "",
            found["names"],
            headers["x-amz-content-sha256"],
        ]
    )
    scope = f"{found['date']}/{region}/s3/aws4_request"
    to_sign = "\n".join(
        [
            "AWS4-HMAC-SHA256",
            headers["x-amz-date"],
            scope,
            hashlib.sha256(canonical.encode()).hexdigest(),
        ]
    )
    key = f"AWS4{secret_key}".encode()
    for part in (found["date"], region, "s3", "aws4_request"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    expected = hmac.new(key, to_sign.encode(), hashlib.sha256).hexdigest()
    return None if hmac.compare_digest(expected, found["signature"]) else "SignatureDoesNotMatch"
