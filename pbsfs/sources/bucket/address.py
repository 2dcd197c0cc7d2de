"""Where a datastore is in an object store: the bucket, the store in it, and the address that serves it.

Used by `pbsfs.access`, which parses what users name, and by the bucket source. Pure; from any thread.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from pbsfs.base.errors import UsageError
from pbsfs.base.text import excerpt
from pbsfs.sources.http.peer import Kind, address_of, authority_of

SCHEME = "s3://"

DEFAULT_REGION = "us-east-1"
"""The region of AWS's own tools where none is given and the endpoint is AWS's."""

MAX_LENGTH = 1024
"""Bytes of a key at most, and so of a store's name. Source: AWS, "Naming Amazon S3 objects"."""

OBJECT_STORE = Kind(
    name="an S3 object store",
    named_in="the endpoint",
    program="the object store",
    shown_by="its administrator",
    accept="--fingerprint, or name its CA with --ca-file",
)
"""Words for errors about the server that an address names."""

_BUCKET = re.compile(r"[a-z0-9](?:[a-z0-9.-]{1,61})[a-z0-9]", re.ASCII)
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?|[0-9A-Fa-f:.]+", re.ASCII)
_REGION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)
_FORM = "write s3://BUCKET/DATASTORE"


@dataclass(frozen=True, slots=True)
class BucketAddress:
    """`store`: the datastore's name, the start of its keys; perhaps with a prefix before it, `a/b/store`.

    `endpoint`: scheme, host and perhaps a port, without a path; None: AWS's own of the region. `region`: None
    means the endpoint's usual one. `path_style`: whether the bucket's name is in the path; None: as the
    endpoint usually has it, which is in the host's name for AWS and in the path elsewhere.
    """

    bucket: str
    store: str
    endpoint: str | None = None
    region: str | None = None
    path_style: bool | None = None

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        endpoint: str | None = None,
        region: str | None = None,
        path_style: bool | None = None,
    ) -> BucketAddress:
        """`text`: `s3://BUCKET/STORE`. Raises UsageError."""
        if not text.startswith(SCHEME):
            raise UsageError(f"'{excerpt(text)}' is not a bucket; {_FORM}")
        bucket, _slash, store = text[len(SCHEME) :].partition("/")
        if not _BUCKET.fullmatch(bucket):
            raise UsageError(f"'{excerpt(bucket)}' is not the name of a bucket; {_FORM}")
        store = store.rstrip("/")
        steps = store.split("/")
        if len(store.encode(errors="replace")) > MAX_LENGTH // 2 or not store.isprintable():
            raise UsageError(f"'{excerpt(store)}' is not the name of a datastore; {_FORM}")
        if store and any(step in ("", ".", "..") for step in steps):
            raise UsageError(f"'{excerpt(store)}' is not the name of a datastore; {_FORM}")
        if region is not None and not _REGION.fullmatch(region):  # it is a part of names and signatures
            raise UsageError(
                f"'{excerpt(region)}' is not the name of a region; write one such as eu-central-1"
            )
        return cls(bucket, store, _endpoint(endpoint), region, path_style)

    @property
    def has_path_style(self) -> bool:
        """Whether the bucket's name is the first part of the path, instead of the host's name."""
        if self.path_style is not None:
            return self.path_style
        # A certificate for *.s3.REGION.amazonaws.com covers no bucket whose name has a dot.
        return "." in self.bucket or not self.is_aws

    @property
    def url(self) -> str:
        """The endpoint, also where it is AWS's own of the region."""
        return self.endpoint or f"https://{_of_aws(self.signing_region)}"

    @property
    def is_aws(self) -> bool:
        """Whether the object store is AWS's own."""
        return _is_aws(self.url)

    @property
    def signing_region(self) -> str:
        """The region in signatures."""
        return self.region or DEFAULT_REGION

    @property
    def secure(self) -> bool:
        """Whether connections use TLS."""
        return self.url.startswith("https://")

    @property
    def host(self) -> str:
        """The name or address to connect to, without a port and brackets."""
        name = urlsplit(self.url).hostname
        assert name is not None  # `_endpoint` has checked it
        return name if self.has_path_style else f"{self.bucket}.{name}"

    @property
    def port(self) -> int:
        given = urlsplit(self.endpoint).port if self.endpoint else None
        return given if given is not None else (443 if self.secure else 80)

    @property
    def address(self) -> str:
        """`host:port`, with brackets around an IPv6 address."""
        return address_of(self.host, self.port)

    @property
    def port_hint(self) -> str:
        """For errors: no correction of a port."""
        return ""

    @property
    def kind(self) -> Kind:
        return OBJECT_STORE

    @property
    def authority(self) -> str:
        """The `Host` header."""
        return authority_of(self.host, self.port, secure=self.secure)

    def path(self, key: str = "") -> str:
        """The path of a request for the object `key`, encoded; for the bucket itself without one."""
        path = f"/{self.bucket}/{key}" if self.has_path_style else f"/{key}"
        return quote(path.rstrip("/") if not key and self.has_path_style else path, safe="/-._~")

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.store}" if self.store else f"{SCHEME}{self.bucket}"


def _of_aws(region: str) -> str:
    """Source: AWS, "Amazon S3 endpoints and quotas", and "Endpoints" of AWS in China."""
    return f"s3.{region}.amazonaws.com{'.cn' if region.startswith('cn-') else ''}"


def _is_aws(endpoint: str) -> bool:
    host = urlsplit(endpoint).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))


def _endpoint(text: str | None) -> str | None:
    """The endpoint in one form: a scheme, a host, and a port if it is not the scheme's."""
    if text is None:
        return None
    if "@" in text:  # not shown: it may have a secret
        raise UsageError("an endpoint has no user and password; give the access key in the environment")
    if "://" not in text:
        text = f"https://{text}"
    wrong = f"'{excerpt(text)}' is not an endpoint; write https://HOST or https://HOST:PORT"
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise UsageError(wrong) from None
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or not _HOST.fullmatch(parts.hostname)
        or parts.path not in ("", "/")
        or parts.query
        or parts.fragment
        or port == 0
    ):
        raise UsageError(wrong)
    return f"{parts.scheme}://{parts.netloc}"
