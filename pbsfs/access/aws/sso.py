"""The login of AWS's IAM Identity Center (SSO), which gives the key of a role.

`aws sso login` makes the login, in a browser, and keeps its token in a file, which `login` reads and renews.
Synchronous, for worker threads.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import ClassVar
from urllib.parse import urlencode

from pbsfs.access.aws.ask import Route, Service, ask
from pbsfs.access.aws.keys import KeySource, checked
from pbsfs.access.aws.login import EXPIRED, SSO_TIMEOUT, NoTokenError, json_object, token_in
from pbsfs.access.aws.tokens import refused
from pbsfs.base.errors import AuthError
from pbsfs.base.text import quoted
from pbsfs.sources.bucket.credentials import AwsCredentials

SSO_VARIABLE = "AWS_ENDPOINT_URL_SSO"


@dataclass(frozen=True, slots=True, repr=False)
class LoginKey(KeySource):
    """The key of `role` in `account`, for the login whose token is in `token_file`.

    `url`: of the portal. `oidc_url`: of the service that renews tokens. `profile`: of AWS's files, for
    errors. Source: AWS, "GetRoleCredentials" of the IAM Identity Center portal, and "IAM Identity Center
    credential provider" of the SDKs and tools reference.
    """

    kind: ClassVar[str] = "login"
    url: str
    oidc_url: str
    account: str
    role: str
    token_file: str
    profile: str
    route: Route

    def fetch(self) -> AwsCredentials:
        token = self._token()
        query = urlencode({"role_name": self.role, "account_id": self.account})
        service = Service.parse(f"{self.url.rstrip('/')}/federation/credentials?{query}", SSO_VARIABLE)
        headers = {"x-amz-sso_bearer_token": token}
        reply = ask(service, SSO_TIMEOUT, headers=headers, route=self.route)
        if reply.status == 401:
            raise self._expired()
        found = json_object(reply.body)
        if reply.status != 200:
            said = found.get("message")
            what = f"gives no key for the role {self.role} in the account {self.account}"
            raise refused(service, reply, what, said if isinstance(said, str) else "")
        key = found.get("roleCredentials")
        if not isinstance(key, dict):
            raise AuthError(f"{service.address}: what it gives is not a key; check {SSO_VARIABLE}")
        end = key.get("expiration")
        return checked(
            service.address,
            key.get("accessKeyId"),
            key.get("secretAccessKey"),
            key.get("sessionToken"),
            _time_of(end) if isinstance(end, int) else end,
        )

    def _token(self) -> str:
        try:
            return token_in(self.token_file, self.oidc_url, self.route)
        except FileNotFoundError:
            raise AuthError(f"AWS profile {quoted(self.profile)}: not logged in; {self._advice}") from None
        except OSError as error:
            raise AuthError(f"{self.token_file}: {error.strerror}; {self._advice}") from None
        except NoTokenError as error:
            if str(error) == EXPIRED:
                raise self._expired() from None
            raise AuthError(f"{self.token_file}: {error}; {self._advice}") from None

    def _expired(self) -> AuthError:
        return AuthError(f"AWS profile {quoted(self.profile)}: the login has expired; {self._advice}")

    @property
    def _advice(self) -> str:
        return f"run aws sso login --profile {self.profile}"

    def __str__(self) -> str:
        return f"of the role {self.role} in the account {self.account}, by the login of {self.profile}"


def _time_of(milliseconds: int) -> str:
    """A time since 1970 as text; what is not a time stays what it is."""
    try:
        return datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC).isoformat()
    except (ValueError, OverflowError, OSError):
        return str(milliseconds)
