"""Signs requests to an object store or another service of AWS: AWS Signature Version 4, in the header
`Authorization`.

Pure functions, for any thread. Source: AWS, "Authenticating Requests: Using the Authorization Header (AWS
Signature Version 4)"; the examples there are the tests.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import time
from collections.abc import Mapping
from urllib.parse import quote

from pbsfs.sources.bucket.credentials import AwsCredentials

EMPTY = hashlib.sha256(b"").hexdigest()
"""The digest of an empty body, in hex: requests to an object store have no other one."""

_ALGORITHM = "AWS4-HMAC-SHA256"
_UNRESERVED = "-._~"  # letters and digits are, always


def query_of(parameters: Mapping[str, str]) -> str:
    """The query of a request, encoded and in the order that signatures need."""
    pairs = sorted((quote(k, safe=_UNRESERVED), quote(v, safe=_UNRESERVED)) for k, v in parameters.items())
    return "&".join(f"{name}={value}" for name, value in pairs)


def signed_headers(
    path: str,
    query: str,
    headers: Mapping[str, str],
    credentials: AwsCredentials,
    *,
    region: str,
    now: float,
    method: str = "GET",
    service: str = "s3",
    body: bytes = b"",
) -> dict[str, str]:
    """`headers` with those that sign a request.

    `path`: encoded. `query`: as `query_of` returns it. `headers`: all that are sent but those of the
    connection; their names in lower case, `host` among them. `now`: seconds since 1970.
    """
    date = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
    digest = hashlib.sha256(body).hexdigest() if body else EMPTY
    found = {**headers, "x-amz-content-sha256": digest, "x-amz-date": date}
    if credentials.token is not None:
        found["x-amz-security-token"] = credentials.token
    names = ";".join(sorted(found))
    lines = "".join(f"{name}:{found[name].strip()}\n" for name in sorted(found))
    request = f"{method}\n{path}\n{query}\n{lines}\n{names}\n{digest}"
    scope = f"{date[:8]}/{region}/{service}/aws4_request"
    text = f"{_ALGORITHM}\n{date}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
    key = _signing_key(credentials.secret_key, scope)
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    who = f"Credential={credentials.access_key}/{scope}"
    found["authorization"] = f"{_ALGORITHM} {who}, SignedHeaders={names}, Signature={signature}"
    return found


@functools.lru_cache(maxsize=4)
def _signing_key(secret_key: str, scope: str) -> bytes:
    """The key of one day, region and service, made of the secret key."""
    key = f"AWS4{secret_key}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key
