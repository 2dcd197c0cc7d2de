"""Every request that was recorded of a real server is answered as the real server did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.server.conftest import PASSWORD, SECRET
from tests.server.h2_client import Connection, Reply, Session
from tests.support import golden
from tests.support.server import ReferenceServer
from tests.support.server.releases import PBS_3, PBS_4

Servers = dict[str, ReferenceServer]

SNAPSHOT = "store=golden&backup-type=vm&backup-id=100&backup-time=1700000000"
VIEWER = {"authorization": f"PBSAPIToken reader@pbs!viewer:{quote(SECRET)}"}
LIMITED = {"authorization": f"PBSAPIToken reader@pbs!limited:{quote(SECRET)}"}


RELEASES = {"api": PBS_3, "api-4.2.3": PBS_4}
"""Where the answers of each line were recorded."""


def recordings(prefix: str = "") -> list[Path]:
    """Those whose name starts with `prefix`; without one, those of the HTTP API."""
    found = [path for place in RELEASES for path in sorted((golden.ROOT / place).glob(f"{prefix}*.json"))]
    return [path for path in found if prefix or not path.name.startswith(("h2-", "reader-"))]


def read(path: Path) -> dict[str, Any]:
    recorded: dict[str, Any] = json.loads(path.read_text())
    return recorded


def ids(path: Path) -> str:
    return f"{path.stem}-{RELEASES[path.parent.name].version}"


def in_order(value: Any) -> Any:
    """`value` without the order of lists, which is that of a directory."""
    if isinstance(value, list):
        return sorted((in_order(item) for item in value), key=json.dumps)
    if isinstance(value, dict):
        return {name: in_order(item) for name, item in sorted(value.items())}
    return value


def check(reply: Reply, recorded: dict[str, Any], *names: str) -> None:
    """Holds status, header fields of these names and body against what was recorded."""
    assert reply.status == recorded["status"]
    assert {n: v for n, v in reply.headers.items() if n in names} == recorded["headers"]
    body = recorded["body"]
    if isinstance(body, str):
        assert reply.text == body
    elif "first bytes" in body:
        assert len(reply.body) == body["length"]
        assert reply.body.startswith(bytes.fromhex(body["first bytes"]))
    else:
        assert in_order(json.loads(reply.text)) == in_order(body)


@pytest.mark.golden
def test_there_are_recordings() -> None:
    assert len(recordings()) > 20
    assert len(recordings("h2-")) > 10
    assert len(recordings("reader-")) > 5


@pytest.mark.golden
@pytest.mark.parametrize("path", recordings(), ids=ids)
def test_api(golden_servers: Servers, path: Path) -> None:
    recorded = read(path)
    golden_server = golden_servers[path.parent.name]
    ticket = golden_server.accounts.tickets.issue("reader@pbs")
    request = recorded["request"]
    headers = {name.lower(): text for name, text in request["headers"].items()}
    if "authorization" in headers:
        headers["authorization"] = headers["authorization"].replace("<secret>", quote(SECRET))
    if "cookie" in headers:
        headers["cookie"] = headers["cookie"].replace("<secret>", quote(ticket, safe=""))
    secret = ticket if path.stem == "login-with-ticket" else PASSWORD
    if headers.get("content-type", "").endswith("urlencoded"):
        secret = quote(secret, safe="")
    body = (request["body"] or "").replace("<secret>", secret).encode()
    with Connection(golden_server) as connection:
        reply = connection.request(request["method"], request["path"], headers, body)
    assert reply.reason == recorded["reason"]
    if path.stem.startswith("login") and recorded["status"] == 200:
        assert reply.data["ticket"].startswith("PBS:reader@pbs:")
        assert reply.data["CSRFPreventionToken"]
        recorded["body"]["data"] |= {name: reply.data[name] for name in ("ticket", "CSRFPreventionToken")}
    check(reply, recorded, "content-type", "transfer-encoding")


@pytest.mark.golden
@pytest.mark.parametrize("path", recordings("reader-"), ids=ids)
def test_reader_upgrade(golden_servers: Servers, path: Path) -> None:
    recorded = read(path)
    golden_server = golden_servers[path.parent.name]
    auth = {} if "no-auth" in path.stem else LIMITED if "limited" in path.stem else VIEWER
    upgrade = {"connection": "upgrade", "upgrade": recorded["request"]["upgrade"]}
    with Connection(golden_server) as connection:
        connection.send("GET", recorded["request"]["path"], auth | upgrade)
        reply = connection.read_head()
        if reply.status != 101:
            reply.body = connection.read(int(reply.headers["content-length"]))
        check(reply, recorded, "content-type", "content-length", "connection", "upgrade", "set-cookie")


@pytest.mark.golden
@pytest.mark.parametrize("path", [path for path in recordings("h2-") if "settings" not in path.stem], ids=ids)
def test_reader_request(golden_servers: Servers, path: Path) -> None:
    recorded = read(path)
    golden_server = golden_servers[path.parent.name]
    with Session(golden_server, VIEWER, SNAPSHOT) as session:
        if path.stem in ("h2-chunk", "h2-chunk-not-in-index"):
            session.get("/download?file-name=drive-scsi0.img.fidx")
        reply = session.get(recorded["request"]["path"])
    if "datastore/" in str(recorded["body"]):  # a path that was made shorter after the recording
        recorded["headers"]["content-length"] = str(len(recorded["body"]))
    assert reply.reset == recorded["reset"]
    check(reply, recorded, "content-type", "content-length")


@pytest.mark.golden
@pytest.mark.parametrize("place", RELEASES)
def test_reader_settings(golden_servers: Servers, place: str) -> None:
    recorded = read(golden.ROOT / place / "h2-server-settings.json")
    golden_server = golden_servers[place]
    with Session(golden_server, VIEWER, SNAPSHOT) as session:
        session.get("/speedtest")
        assert {str(code): value for code, value in session.settings.items()} == recorded
