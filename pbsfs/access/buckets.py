"""From resolved options to the access to a bucket: its address, certificate and key.

What neither options nor profile say comes from the variables of AWS's tools, and if the key is looked for
there, from their files. A profile with a key of its own is complete. Called by `pbsfs.access.resolve` and by
`config check`. Synchronous; it may connect to the object store to look at its certificate.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from pbsfs.access.aws.files import AwsProfile, read_profile
from pbsfs.access.aws.find import find_key
from pbsfs.access.aws.keys import GivenKey, KeySource, NoKey
from pbsfs.access.aws.s3cfg import S3Endpoint, read_endpoint
from pbsfs.access.description import BucketAccess
from pbsfs.access.options import SourceOptions
from pbsfs.access.references import read_reference
from pbsfs.access.terminal import Terminal
from pbsfs.access.trust import find_trust, read_ca
from pbsfs.base.errors import UsageError
from pbsfs.sources.bucket.address import BucketAddress
from pbsfs.sources.http.proxy import Proxy, find_proxy
from pbsfs.sources.http.tls import Trust, parse_fingerprint

log = logging.getLogger(__name__)

ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
IGNORE_ENDPOINTS_VARIABLE = "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS"
REGION_VARIABLES = ("AWS_REGION", "AWS_DEFAULT_REGION")
CA_VARIABLE = "AWS_CA_BUNDLE"


class Bucket:
    """What names the bucket of resolved options, found out step by step; `config check` shows the steps."""

    def __init__(self, options: SourceOptions, environment: Mapping[str, str]) -> None:
        """Reads the files of AWS's tools, or a server's `s3.cfg`. Raises UsageError."""
        assert options.bucket is not None
        self._options = options
        self._environment = environment
        named = BucketAddress.parse(options.bucket)
        endpoint: str | None = None
        region: str | None = None
        path_style: bool | None = None
        self._server: S3Endpoint | None = None
        self._profile: AwsProfile | None = None
        if options.s3_config is not None:
            self._server = server = read_endpoint(options.s3_config, named.bucket, named.store)
            endpoint, region, path_style = server.endpoint, server.region, server.path_style
        elif options.access_key is None:
            if not options.anonymous:
                self._profile = read_profile(options.aws_profile, environment)
            endpoint, region, path_style = self._endpoint(), self._region(), self._path_style()
        self.address = BucketAddress.parse(
            options.bucket,
            endpoint=options.endpoint or endpoint,
            region=options.region or region,
            path_style=path_style if options.path_style is None else options.path_style,
        )

    def _setting(self, key: str) -> str | None:
        return None if self._profile is None else self._profile.setting(key)

    def _endpoint(self) -> str | None:
        """Source: AWS, "Service-specific endpoints" of the SDKs and tools reference."""
        ignored = self._environment.get(IGNORE_ENDPOINTS_VARIABLE)
        ignored = ignored or self._setting("ignore_configured_endpoint_urls") or ""
        if ignored.lower() == "true":
            return None
        found = _first_set(ENDPOINT_VARIABLES, self._environment)
        if found is None and self._profile is not None:
            found = self._profile.services.get("s3.endpoint_url")
        return found or self._setting("endpoint_url")

    def _region(self) -> str | None:
        return _first_set(REGION_VARIABLES, self._environment) or self._setting("region")

    def _path_style(self) -> bool | None:
        """Source: AWS CLI, "S3 configuration": addressing_style."""
        return {"path": True, "virtual": False}.get(self._setting("s3.addressing_style") or "")

    def proxy(self) -> Proxy | None:
        """The proxy to the object store. Raises UsageError."""
        return find_proxy(self.address, self._environment) if self.address.secure else None

    def trust(self, proxy: Proxy | None, terminal: Terminal | None) -> Trust:
        """By what the object store is trusted. Raises UsageError, and what connecting raises."""
        options, server = self._options, self._server
        fingerprint = options.fingerprint
        if not fingerprint and options.ca_file is None and options.endpoint is None and server is not None:
            fingerprint = server.fingerprint
        if not self.address.secure:
            if fingerprint or options.ca_file is not None:
                raise UsageError(
                    f"{self.address.endpoint}: an http:// endpoint has no certificate; write https://, or "
                    "leave out its fingerprint and CA"
                )
            return Trust()
        if fingerprint:
            return Trust(pinned=parse_fingerprint(fingerprint))
        if options.ca_file is not None:
            return Trust(ca=read_ca(options.ca_file))
        if (bundle := self._bundle()) is not None:
            return Trust(ca=bundle)
        if self.address.is_aws:
            return Trust()  # AWS's own: a CA of the system has signed its certificate
        return find_trust(None, self.address, proxy, self._environment, terminal)

    def _bundle(self) -> str | None:
        """The CAs that AWS's tools trust, if others than the system's are named. Raises UsageError."""
        file = self._environment.get(CA_VARIABLE) or self._setting("ca_bundle")
        return read_ca(Path(file)) if file else None

    def key(self) -> KeySource:
        """Where the key comes from; reads the secret of a profile. Raises UsageError, AuthError."""
        options = self._options
        if options.anonymous:
            return NoKey()
        if options.access_key is not None and options.secret_key is not None:
            secret = read_reference(options.secret_key, self._environment)
            return GivenKey(str(options.secret_key), options.access_key, secret.reveal())
        if self._server is not None:
            if self._server.readable_by_others:
                file = self._options.s3_config
                log.warning("%s: every user of this machine may read it; run chmod o-r on it", file)
            return GivenKey(self._server.place, self._server.access_key, self._server.secret_key)
        assert self._profile is not None
        return find_key(self._profile, self.address.region, self._environment, self._bundle())


def find_bucket(
    options: SourceOptions, environment: Mapping[str, str], terminal: Terminal | None
) -> BucketAccess:
    """How to get at the bucket of resolved options.

    Raises UsageError, AuthError if there is no key, and what connecting raises.
    """
    bucket = Bucket(options, environment)
    if options.offline:
        return BucketAccess(bucket.address, NoKey(), Trust())  # it is not asked
    proxy = bucket.proxy()
    trust = bucket.trust(proxy, terminal)
    return BucketAccess(bucket.address, bucket.key(), trust, proxy, options.retry_timeout)


def _first_set(variables: tuple[str, ...], environment: Mapping[str, str]) -> str | None:
    return next((environment[each] for each in variables if environment.get(each)), None)
