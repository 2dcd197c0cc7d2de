"""Checks the signature of a request as it was received: AWS Signature Version 4, from the server's side.

Written from AWS's description and not from pbsfs's code, which it tests.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Mapping

_AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=(?P<key>[^/]+)/(?P<date>\d{8})/(?P<region>[^/]+)/(?P<service>s3|sts)/"
    r"aws4_request, SignedHeaders=(?P<names>[a-z0-9;-]+), Signature=(?P<signature>[0-9a-f]{64})"
)


def signed(
    method: str, target: str, headers: Mapping[str, str], access_key: str, secret_key: str, region: str
) -> dict[str, str]:
    """`headers` and those that sign a request whose body is not signed.

    `target`: encoded, without a query.
    """
    date = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    found = {**headers, "x-amz-content-sha256": "UNSIGNED-PAYLOAD", "x-amz-date": date}
    names = ";".join(sorted(found))
    signature = _signature(method, target, found, names, date[:8], secret_key, region, "s3")
    found["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={access_key}/{date[:8]}/{region}/s3/aws4_request, "
        f"SignedHeaders={names}, Signature={signature}"
    )
    return found


def refused(
    method: str,
    target: str,
    headers: Mapping[str, str],
    access_key: str,
    secret_key: str,
    region: str,
    service: str = "s3",
) -> str | None:
    """The code of the error for a request that is not signed as it has to be; None if it is.

    `target`: path and query as received. `headers`: names in lower case.
    """
    found = _AUTHORIZATION.fullmatch(headers.get("authorization", ""))
    if found is None:
        return "AccessDenied"
    if found["key"] != access_key:
        return "InvalidAccessKeyId"
    if (found["region"], found["service"]) != (region, service):
        return "AuthorizationHeaderMalformed"
    if not {"host", "x-amz-content-sha256", "x-amz-date"} <= set(found["names"].split(";")):
        return "AccessDenied"
    expected = _signature(
        method, target, headers, found["names"], found["date"], secret_key, region, found["service"]
    )
    return None if hmac.compare_digest(expected, found["signature"]) else "SignatureDoesNotMatch"


def _signature(
    method: str,
    target: str,
    headers: Mapping[str, str],
    signed_names: str,
    date: str,
    secret_key: str,
    region: str,
    service: str,
) -> str:
    path, _question, query = target.partition("?")
    names = signed_names.split(";")
    canonical = "\n".join(
        [
            method,
            path,
            "&".join(sorted(pair if "=" in pair else f"{pair}=" for pair in query.split("&")))
            if query
            else "",
            *(f"{name}:{' '.join(headers.get(name, '').split())}" for name in names),
            "",
            signed_names,
            headers["x-amz-content-sha256"],
        ]
    )
    scope = f"{date}/{region}/{service}/aws4_request"
    to_sign = "\n".join(
        [
            "AWS4-HMAC-SHA256",
            headers["x-amz-date"],
            scope,
            hashlib.sha256(canonical.encode()).hexdigest(),
        ]
    )
    key = f"AWS4{secret_key}".encode()
    for part in (date, region, service, "aws4_request"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    return hmac.new(key, to_sign.encode(), hashlib.sha256).hexdigest()
