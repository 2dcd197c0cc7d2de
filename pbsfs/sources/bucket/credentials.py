"""The key that signs requests to an object store.

`pbsfs.access` finds it where AWS's tools have it; the bucket source asks for it before it signs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, repr=False)
class AwsCredentials:
    """`token`: of temporary keys. `expires`: seconds since 1970 from which the key is not valid any more;
    None: it does not expire. Has no `repr`: it holds secrets."""

    access_key: str
    secret_key: str
    token: str | None = None
    expires: float | None = None


class CredentialSource(Protocol):
    """Where the key comes from."""

    def current(self) -> AwsCredentials | None:
        """The key that is valid now; None: requests are not signed (a public bucket).

        Called in worker threads, several at once; may block, and renews a key before it expires. Raises
        AuthError if there is none, and ConnectError if the service that hands it out is unreachable.
        """
