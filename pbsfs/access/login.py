"""Logging in before the source is opened, at a terminal: the user may have to give a second factor.

A mount in the background and nbdkit cannot ask, so the ticket is part of the description that they get.
Called by `pbsfs.access.resolve` and by `pbsfs login`. Synchronous: it runs a trio loop.
"""

from __future__ import annotations

from pbsfs.access.terminal import Terminal
from pbsfs.base.errors import AuthError
from pbsfs.base.secret import Secret, Ticket
from pbsfs.sources.http.proxy import Proxy
from pbsfs.sources.http.tls import Trust
from pbsfs.sources.server.repository import Repository

MAX_TRIES = 3
"""How often the user may give a second factor: after 8 wrong codes in a row, a server locks them."""


def log_in(
    repository: Repository, password: Secret, trust: Trust, proxy: Proxy | None, terminal: Terminal | None
) -> Ticket:
    """The ticket of the user, who is asked for a second factor if the login needs one.

    The ticket has the password, unless the login took more than that. Raises SecondFactorError if nobody can
    be asked, AuthError, and what connecting raises.
    """
    import trio  # noqa: PLC0415 - slow to import, and needed for users with a password only

    from pbsfs.sources.server.api import Api  # noqa: PLC0415
    from pbsfs.sources.server.second_factor import SecondFactorError  # noqa: PLC0415

    api = Api(repository, password, trust, proxy)

    async def run() -> Ticket:
        refused = ""
        for _ in range(MAX_TRIES):
            try:
                return Ticket((await api.login.ticket()).reveal(), password)
            except SecondFactorError as error:
                challenge = error.challenge
                if terminal is None or not challenge.kinds:
                    raise
            text = f"{refused}{challenge.kinds} of {repository.user} at {repository.address}"
            while (response := challenge.response(terminal.password(text).reveal())) is None:
                text = f"this is not a {challenge.kinds}; try again"
            ticket = await api.login.answer(challenge, response)
            if ticket is not None:
                return Ticket(ticket.reveal())
            refused = "the server does not accept it: it is wrong, too old, or was used before\n"
        raise AuthError(
            f"{repository.address} does not accept the second factor of {repository.user}; wait for a new "
            "code, or use a recovery code; after 8 wrong codes the server locks them, until an administrator "
            f"runs proxmox-backup-manager user tfa unlock {repository.user}"
        )

    try:
        return trio.run(run)
    finally:
        api.close()
