"""What error answers of an object store mean, and the error of pbsfs for each: the one place that knows them.

An object store answers an error with a status and an XML document that has a code. Used by `requests`. Pure;
from any thread.

Source of the codes: AWS, "Error responses" of the S3 API; Ceph, MinIO and Garage use the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from pbsfs.base.errors import (
    AuthError,
    DamageError,
    ForbiddenError,
    NotFoundError,
    PbsfsError,
    SourceError,
    UnavailableError,
    UnknownDatastoreError,
    WrongServerError,
)
from pbsfs.base.text import one_line
from pbsfs.sources.bucket import xml
from pbsfs.sources.bucket.address import BucketAddress
from pbsfs.sources.http.client import Answer

MAX_WORDS = 500
"""Characters that pbsfs shows of an error's code and message."""

MISSING_CODES = ("NoSuchKey", "NoSuchVersion")

_PASSING = (408, 425, 429, 500, 502, 503, 504, *range(520, 528))
"""Statuses of requests that may succeed later; the last are those of Cloudflare."""

_PASSING_CODES = (
    *("SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "ThrottlingException"),
    *("OperationAborted", "RequestLimitExceeded", "TooManyRequests", "Busy", "ServerBusy"),
)
"""The same, where the status is another: RequestTimeout comes with status 400."""

_KEY_CODES = ("InvalidAccessKeyId", "InvalidClientTokenId", "NotSignedUp")
_TOKEN_CODES = ("ExpiredToken", "InvalidToken", "TokenRefreshRequired", "ExpiredTokenException")
_REGION_CODES = (
    *("PermanentRedirect", "TemporaryRedirect", "Redirect", "AuthorizationHeaderMalformed"),
    *("IllegalLocationConstraintException", "InvalidRegion"),
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error answer. `code`: empty if the answer has none. `is_xml`: whether it is an S3 error
    document. `is_foreign`: whether it has a body that is not one, as an answer of a proxy."""

    status: int
    code: str
    message: str
    region: str
    endpoint: str
    server_time: str
    is_xml: bool
    is_foreign: bool

    @classmethod
    def of(cls, answer: Answer) -> Refusal:
        """Any answer; an answer to HEAD has no document."""
        headers = answer.headers
        code = message = server_time = ""
        region = headers.get("x-amz-bucket-region", "")
        endpoint = headers.get("location", "")
        is_xml = False
        try:
            document = xml.parse(answer.body, "Error")
        except DamageError:
            pass
        else:
            is_xml = True
            code, message = xml.text_of(document, "Code"), xml.text_of(document, "Message")
            region = region or xml.text_of(document, "Region")
            endpoint = xml.text_of(document, "Endpoint") or endpoint
            server_time = xml.text_of(document, "ServerTime")
        return cls(
            status=answer.status,
            code=one_line(code, 100),
            message=one_line(message, MAX_WORDS),
            region=one_line(region, 100),
            endpoint=one_line(endpoint, 300),
            server_time=one_line(server_time or headers.get("date", ""), 100),
            is_xml=is_xml,
            is_foreign=bool(answer.body.strip()) and not is_xml,
        )

    @property
    def words(self) -> str:
        """What the server says, as one line."""
        said = ": ".join(filter(None, (self.code, self.message)))
        return f"status {self.status}, {said}" if said else f"status {self.status}"

    @property
    def may_pass(self) -> bool:
        """Whether the same request may succeed later."""
        return self.status in _PASSING or self.code in _PASSING_CODES

    @property
    def concerns_key(self) -> bool:
        """Whether another access key may be accepted: it was exchanged, or has expired."""
        return self.code in (*_KEY_CODES, *_TOKEN_CODES, "SignatureDoesNotMatch")

    def error(self, address: BucketAddress, what: str) -> PbsfsError:
        """The error for this answer to a request for `what`."""
        server = address.address
        if self.code == "NoSuchBucket":
            return UnknownDatastoreError(
                f"{server} has no bucket '{address.bucket}'; "
                "check the bucket's name, the endpoint and the region"
            )
        if self.code in MISSING_CODES or (self.status == 404 and not self.code and not self.is_foreign):
            return NotFoundError(f"{server}: {what} does not exist")
        if self.may_pass:
            return UnavailableError(f"{server}: {self.words}")
        if self.code in _REGION_CODES or self.status in (301, 302, 307, 308):
            return self._elsewhere(address)
        if self.code == "RequestTimeTooSkewed":
            return SourceError(
                f"{server} refuses requests because this computer's clock is wrong: the server's time is "
                f"{self.server_time or 'unknown'}; set the clock (timedatectl shows it)"
            )
        if self.code in _KEY_CODES:
            return AuthError(f"{server} does not know the access key ({self.words}); check the access key")
        if self.code == "SignatureDoesNotMatch":
            return AuthError(
                f"{server} does not accept the signature ({self.words}); "
                "check that the secret key belongs to the access key, and the region"
            )
        if self.code in _TOKEN_CODES:
            return AuthError(
                f"{server}: the temporary access key is not valid any more ({self.words}); get a new one"
            )
        if self.code == "InvalidObjectState":
            return SourceError(
                f"{server}: {what} is in an archive of the object store ({self.words}); "
                "restore it there first"
            )
        if self.status in (401, 403):
            return ForbiddenError(
                f"{server} does not allow reading {what} ({self.words}); allow the access key "
                f"s3:ListBucket on the bucket '{address.bucket}' and s3:GetObject on what is in it"
            )
        if not self.is_xml and self.status in (400, 404, 405, 406, 415, 426, 501):
            return WrongServerError(
                f"{server} does not answer as an S3 object store does ({self.words}); check the endpoint"
            )
        return SourceError(f"{server}: {self.words}")

    def _elsewhere(self, address: BucketAddress) -> SourceError:
        """The error for an answer that names another place."""
        where = f"the bucket '{address.bucket}'"
        if self.region and self.region != address.signing_region:
            return SourceError(
                f"{address.address}: {where} is in the region {self.region}, not in "
                f"{address.signing_region}; give --region {self.region}"
            )
        if self.endpoint:
            return SourceError(
                f"{address.address}: {where} is at {self.endpoint}; give its region with --region, or its "
                "server with --endpoint"
            )
        return SourceError(
            f"{address.address}: {where} is elsewhere ({self.words}); give --region or --endpoint"
        )
