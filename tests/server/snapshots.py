"""The snapshots of made data that the tests of the reader protocol read, and how they read them."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from pbsfs.formats.index import DynamicIndex, FixedIndex
from tests.server.conftest import SECRET
from tests.server.h2_client import PROTOCOL, Connection, Session
from tests.support import made
from tests.support.server import ReferenceServer

VIEWER = {"authorization": f"PBSAPIToken reader@pbs!viewer:{quote(SECRET)}"}
FIRST = made.snapshot()
SECOND = made.snapshot(time=made.TIME + made.DAY)
SNAPSHOT = f"store=made&backup-type=vm&backup-id=100&backup-time={FIRST.time}"
BIG = f"store=made&backup-type=vm&backup-id=100&backup-time={SECOND.time}"


def chunks(session: Session, name: str = "drive-scsi0.img.fidx") -> list[str]:
    """The requests for the chunks of an archive, whose index is downloaded for that."""
    raw = session.get(f"/download?file-name={name}").body
    index = FixedIndex(raw) if name.endswith(".fidx") else DynamicIndex(raw)
    return [f"/chunk?digest={index.digest(chunk).hex()}" for chunk in range(index.count)]


def stored(datastore: Path, request: str) -> bytes:
    digest = request.rpartition("=")[2]
    return (datastore / ".chunks" / digest[:4] / digest).read_bytes()


def refused(server: ReferenceServer, query: str = SNAPSHOT) -> str:
    """The text with which a session is refused."""
    with Connection(server) as connection:
        upgrade = {"connection": "upgrade", "upgrade": PROTOCOL}
        reply = connection.request("GET", f"/api2/json/reader?{query}", VIEWER | upgrade)
    assert reply.status == 400
    return reply.text
