"""AWS's token service (STS): it gives the key of a role.

Synchronous, for worker threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar
from urllib.parse import urlencode
from xml.etree import ElementTree as ET

from pbsfs.access.aws.ask import Service, ask
from pbsfs.access.aws.keys import KeySource, checked
from pbsfs.access.aws.tokens import refused, token_in
from pbsfs.sources.bucket.credentials import AwsCredentials

STS_TIMEOUT = 15.0
"""Seconds for an answer."""


@dataclass(frozen=True, slots=True, repr=False)
class WebIdentityKey(KeySource):
    """STS exchanges a token in a file for the key of a role: in Kubernetes, for example.

    `url`: of STS. `proxies`: the variables of proxies. `ca`: certificates that count instead of the system's
    CAs. Source: AWS, "AssumeRoleWithWebIdentity".
    """

    kind: ClassVar[str] = "web-identity"
    url: str
    role: str
    token_file: str
    session: str
    proxies: Mapping[str, str]
    ca: str | None = None

    def fetch(self) -> AwsCredentials:
        token = token_in(self.token_file)
        parameters = {
            "Action": "AssumeRoleWithWebIdentity",
            "Version": "2011-06-15",
            "RoleArn": self.role,
            "RoleSessionName": self.session,
            "WebIdentityToken": token,
        }
        service = Service.parse(self.url, "AWS_ENDPOINT_URL_STS")
        reply = ask(
            service,
            STS_TIMEOUT,
            method="POST",
            headers={"Content-Type": "application/x-www-form-urlencoded"},
            body=urlencode(parameters).encode(),
            proxies=self.proxies,
            ca=self.ca,
        )
        found = _elements(reply.body)
        if reply.status != 200:
            said = ": ".join(filter(None, (found.get("Code"), found.get("Message"))))
            raise refused(service, reply, f"gives no key for the role {self.role}", said)
        return checked(
            service.address,
            found.get("AccessKeyId"),
            found.get("SecretAccessKey"),
            found.get("SessionToken"),
            found.get("Expiration"),
        )

    def __str__(self) -> str:
        return f"of the role {self.role}, by the token in {self.token_file}"


def _elements(document: bytes) -> dict[str, str]:
    """The texts of an XML document by the names of their elements; empty for another document."""
    try:
        text = document.decode()  # another encoding could hide a document type
        if "<!" in text:  # which could define entities without end
            return {}
        root = ET.fromstring(text)  # noqa: S314 - bounded, and without entities
    except (UnicodeDecodeError, ET.ParseError):
        return {}
    return {each.tag.rpartition("}")[2]: each.text.strip() for each in root.iter() if each.text}
