"""The server source opened on the reference server, over data that is known."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import trio

from pbsfs.base.names import ROOT_NAMESPACE, Archive, Group, Snapshot
from pbsfs.base.secret import Secret
from pbsfs.formats.keys import Key
from pbsfs.reader.image import Image
from pbsfs.reader.reader import Reader, open_reader
from pbsfs.sources.base import SnapshotInfo, Source
from pbsfs.sources.http.tls import Trust, parse_fingerprint
from pbsfs.sources.pacing import Pacing
from pbsfs.sources.server.limits import DEFAULT, ServerLimits
from pbsfs.sources.server.repository import Repository
from pbsfs.sources.server.source import ServerSettings, ServerSource
from pbsfs.testing.writer import DatastoreWriter
from tests.support import made
from tests.support.made import DAY, TIME
from tests.support.server import ReferenceServer

S = TypeVar("S", bound=Source)

USER = "reader@pbs"
TOKEN = "reader@pbs!viewer"
PASSWORD = "p:a s+s/w%rd"
SECRET = "5ec2e7/%41+:secret"

CHUNK = 1 << 16
VM = Group(ROOT_NAMESPACE, "vm", "100")
FIRST = VM.snapshot(TIME)
SECOND = VM.snapshot(TIME + DAY)
IMAGE = Archive("drive-scsi0.img.fidx")
OTHER_IMAGE = Archive("drive-scsi1.img.fidx")
STREAM = Archive("root.pxar.didx")
CONFIG = Archive("qemu-server.conf.blob")

CONTENT = made.image(1, "rrtr0rtrr0rrrrtr", tail=777)
OTHER_CONTENT = made.image(2, "rtr", tail=5)
STREAM_CONTENT = made.image(3, "rtrr", tail=99)
NEWER_CONTENT = made.image(4, "rr0r", tail=1)
CONFIG_CONTENT = b"cores: 2\n" * 50

QUICK = Pacing(first_pause=0.002, longest_pause=0.02)
"""No pause between tries is long."""

LIMIT = 20.0
"""Seconds that anything may take; only when something is broken does it take long."""


def fill(path: Path) -> Path:
    """Makes a datastore of two snapshots in the directory `path`."""
    writer = DatastoreWriter(path)
    writer.add_snapshot(
        FIRST,
        {
            IMAGE.filename: CONTENT,
            OTHER_IMAGE.filename: OTHER_CONTENT,
            STREAM.filename: STREAM_CONTENT,
            CONFIG.filename: CONFIG_CONTENT,
        },
        chunk_size=CHUNK,
    )
    writer.add_snapshot(SECOND, {IMAGE.filename: NEWER_CONTENT}, chunk_size=CHUNK)
    return path


@contextmanager
def served(path: Path) -> Iterator[ReferenceServer]:
    """A server with a user and a token who may read all of the datastore at `path`."""
    with ReferenceServer(path) as server:
        server.add_user(USER, PASSWORD)
        server.add_token(TOKEN, SECRET)
        yield server


def source_of(
    server: ReferenceServer,
    auth_id: str = USER,
    secret: str | None = None,
    *,
    retry_timeout: float = LIMIT,
    stall_timeout: float = LIMIT,
    answer_timeout: float = 3 * LIMIT,
    connections: int | None = 1,
    limits: ServerLimits = DEFAULT,
    pacing: Pacing = QUICK,
) -> ServerSource:
    """A source that was not opened yet. `secret`: where it is not the usual one."""
    if secret is None:
        secret = SECRET if "!" in auth_id else PASSWORD
    return ServerSource(
        Repository.parse(server.repository(auth_id)),
        Secret(secret),
        Trust(pinned=parse_fingerprint(server.fingerprint)),
        ServerSettings(
            retry_timeout=retry_timeout,
            stall_timeout=stall_timeout,
            answer_timeout=answer_timeout,
            connections=connections,
        ),
        limits=replace(limits, pacing=pacing),
    )


@asynccontextmanager
async def opened(source: S) -> AsyncIterator[S]:
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        try:
            with trio.fail_after(LIMIT):
                await source.open(nursery)
            yield source
        except Exception as error:
            failure = error  # raised outside, so that the nursery does not wrap it in a group
        finally:
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await source.aclose()
    if failure is not None:
        raise failure


@asynccontextmanager
async def reading(source: ServerSource, keys: Mapping[str, Key] | None = None) -> AsyncIterator[Reader]:
    """A reader of `source`; nothing that is done with it may hang."""
    with trio.fail_after(3 * LIMIT):
        async with open_reader(source, keys=keys) as reader:
            yield reader


async def info_of(reader: Reader, snapshot: Snapshot = FIRST) -> SnapshotInfo:
    infos = await reader.source.snapshots(snapshot.group)
    return next(info for info in infos if info.snapshot == snapshot)


async def image_of(reader: Reader, snapshot: Snapshot = FIRST, archive: Archive = IMAGE) -> Image:
    info = await info_of(reader, snapshot)
    return await reader.open_image(info, next(file for file in info.files if file.archive == archive))


async def read_all(image: Image) -> bytes:
    return bytes(await image.read(0, image.size))


async def until(condition: Callable[[], object]) -> None:
    """Waits for what threads and the server bring about."""
    with trio.fail_after(LIMIT):
        while not condition():  # noqa: ASYNC110 - nothing tells of it
            await trio.sleep(0.002)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
