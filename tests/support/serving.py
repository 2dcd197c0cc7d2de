"""The real program and the reference server: who comes to it, and how the environment says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.program import environment
from tests.support.server import ReferenceServer, SlowLink
from tests.support.server.releases import PBS_3, Release

STORE = "store1"

USER = "reader@pbs"
PASSWORD = 'geh€im: p"a%s+s/w'
TOKEN = "reader@pbs!laptop"
SECRET = "e7c1bd5a-83f2-4c0e-a7d4-9b4d1f30c6aa"

WAYS_IN = {USER: PASSWORD, TOKEN: SECRET}
"""Both ways to log in, and the secret of each."""


@contextmanager
def serving(
    path: Path, *, link: SlowLink | None = None, release: Release = PBS_3
) -> Iterator[ReferenceServer]:
    """A server over the datastore in `path`, with a user and a token who may read all of it."""
    with ReferenceServer(path, store=STORE, link=link, release=release) as server:
        server.add_user(USER, PASSWORD)
        server.add_token(TOKEN, SECRET)
        yield server


def access(
    server: ReferenceServer, auth_id: str = USER, secret: str | None = None, **changes: str
) -> dict[str, str]:
    """The environment in which pbsfs reads from `server` as `auth_id`."""
    told = {
        "PBS_REPOSITORY": server.repository(auth_id),
        "PBS_PASSWORD": WAYS_IN[auth_id] if secret is None else secret,
        "PBS_FINGERPRINT": server.fingerprint,
    }
    return environment(**(told | changes))


def without(told: dict[str, str], *names: str) -> dict[str, str]:
    """An environment without some of its variables."""
    return {name: value for name, value in told.items() if name not in names}
