"""The description of a source: another process gets all of it, and nobody else any secret in it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pbsfs.access.aws.keys import GivenKey, NoKey
from pbsfs.access.description import (
    KINDS,
    Access,
    BucketAccess,
    Description,
    DirectoryAccess,
    ServerAccess,
)
from pbsfs.access.keyring import MAX_KEYS, KeyRing
from pbsfs.base.errors import UsageError
from pbsfs.base.names import Namespace
from pbsfs.base.secret import Secret, Ticket
from pbsfs.formats.keys import Key
from pbsfs.sources.bucket.address import BucketAddress
from pbsfs.sources.http.proxy import Proxy
from pbsfs.sources.http.tls import Trust
from pbsfs.sources.server.repository import Repository
from tests.support.made import KEY, OTHER_KEY

REPOSITORY = Repository.parse("reader@pbs!laptop@[fd00::1]:8443:store1")
SECRET = Secret('geh€im: p"a%s\n\udcff')
PROXY = Proxy("proxy", 3128, "HTTPS_PROXY", "user", Secret("gehe1m"))
ADDRESS = BucketAddress("b", "a/store", "https://s3:9000", "garage", True)
KEY_OF_BUCKET = GivenKey("here", "AKIDEXAMPLE", SECRET.reveal(), "t0ken")

ACCESSES = [
    DirectoryAccess(Path(os.fsdecode(b"/\xff/\xe2\x98\x83"))),
    ServerAccess(REPOSITORY, SECRET, Trust()),
    ServerAccess(REPOSITORY, SECRET, Trust(pinned="ab" * 32), PROXY, 2.5, 4),
    ServerAccess(REPOSITORY, SECRET, Trust(known="ab" * 32), Proxy("proxy", 1080, "all_proxy"), 0.0, 1),
    BucketAccess(BucketAddress("b", "store"), NoKey(), Trust()),
    BucketAccess(ADDRESS, KEY_OF_BUCKET, Trust(pinned="ab" * 32), PROXY, 2.5),
]


@pytest.mark.parametrize("access", ACCESSES)
@pytest.mark.parametrize("namespace", [(), ("prod", "db")])
def test_what_is_handed_over_is_taken_over_whole(access: Access, namespace: tuple[str, ...]) -> None:
    description = Description(access, Namespace(namespace), KeyRing([KEY, OTHER_KEY]), 1000)
    with description.handed_over() as fd:
        inherited = os.dup(fd)
    found = Description.taken_over(inherited)

    assert type(found.access) is type(access)
    assert found.access.dump() == access.dump()
    assert found.namespace == description.namespace
    assert found.limit_rate == 1000
    assert [key.reveal() for key in found.keys.values()] == [KEY.reveal(), OTHER_KEY.reveal()]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(inherited)


def test_what_a_server_takes_is_all_there() -> None:
    found = ServerAccess.load(ACCESSES[2].dump())
    assert found.repository == REPOSITORY
    assert found.secret.reveal() == SECRET.reveal()
    assert found.trust == Trust(pinned="ab" * 32)
    assert found.proxy is not None
    assert found.proxy.password is not None
    assert (found.proxy.address, found.proxy.user) == ("proxy:3128", "user")
    assert (found.proxy.variable, found.proxy.password.reveal()) == ("HTTPS_PROXY", "gehe1m")
    assert (found.retry_timeout, found.connections) == (2.5, 4)


def test_a_ticket_is_handed_over_as_one_with_the_password_that_may_replace_it() -> None:
    user = Repository.parse("anna@pbs@host:store1")
    for password in (None, SECRET):
        access = ServerAccess(user, Ticket("PBS:geheim", password), Trust())
        found = ServerAccess.load(json.loads(json.dumps(access.dump()))).secret
        assert isinstance(found, Ticket)
        assert found.reveal() == "PBS:geheim"
        assert (found.password and found.password.reveal()) == (password and password.reveal())
        assert "geheim" not in repr(access)
    assert not isinstance(ServerAccess.load(ACCESSES[1].dump()).secret, Ticket)


def test_every_kind_is_handed_over_here() -> None:
    assert {access.kind for access in ACCESSES} == set(KINDS)


def test_more_than_a_pipe_holds_is_handed_over_before_anybody_reads() -> None:
    keys = KeyRing(Key(number.to_bytes(32)) for number in range(MAX_KEYS))
    secret = Secret("x" * (1 << 20))
    with Description(ServerAccess(REPOSITORY, secret, Trust()), Namespace(()), keys).handed_over() as fd:
        found = Description.taken_over(os.dup(fd))
    assert found.keys.keys() == keys.keys()
    assert isinstance(found.access, ServerAccess)
    assert found.access.secret.reveal() == secret.reveal()


def test_a_description_shows_no_secret() -> None:
    for access in ACCESSES:
        shown = repr(Description(access, Namespace(()), KeyRing([KEY]))) + str(access.public())
        assert "geh" not in shown
        assert KEY.reveal().hex() not in shown


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"geheim",
        b"[]",
        b"null",
        b"{}",
        b"\xff",
        b'{"kind": "geheim"}',
        b'{"kind": "server", "access": {}}',
    ],
)
def test_what_is_no_description_is_refused_and_not_shown(data: bytes) -> None:
    fd = os.memfd_create("test")
    os.write(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    with pytest.raises(UsageError, match=f"descriptor {fd}: not the description of a source$") as caught:
        Description.taken_over(fd)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("fd", [-1, 987654])
def test_a_descriptor_that_is_not_open_is_refused(fd: int) -> None:
    with pytest.raises(UsageError, match="not the description"):
        Description.taken_over(fd)
