"""What services that give keys take and refuse: tokens for headers, and what an answer without a key means.

Pure, but for `token_in`; for worker threads.
"""

from __future__ import annotations

from pbsfs.access.aws.ask import Reply, Service
from pbsfs.access.credentials import first_line, read_file
from pbsfs.base.errors import AuthError, ConnectError, SourceError
from pbsfs.base.text import one_line


def printable_token(place: str, token: str) -> str:
    """A token for a header. Raises AuthError."""
    token = token.strip()
    if not token or not token.isascii() or not token.isprintable():
        raise AuthError(f"{place}: the token has characters that no token has; correct it")
    return token


def refused(
    service: Service, reply: Reply, what: str, said: str = "", *, may_pass: bool = False
) -> SourceError:
    """The error for an answer that is not a key: `ConnectError` where it may pass, by its status too."""
    words = f": {one_line(said, 500)}" if said else ""
    text = f"{service.address} {what} (status {reply.status}){words}"
    passing = may_pass or reply.status in (408, 429) or reply.status >= 500
    return ConnectError(text) if passing else AuthError(f"{text}; check the role and who may use it")


def token_in(file: str) -> str:
    """The token in a file. Raises AuthError."""
    try:
        token = first_line(read_file(file))
    except OSError as error:
        raise AuthError(f"{file}: {error.strerror}; check the file of the token") from None
    except ValueError as error:
        raise AuthError(f"{file}: {error}; check the file of the token") from None
    return printable_token(file, token)
