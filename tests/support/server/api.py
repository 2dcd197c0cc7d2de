"""The HTTP API: which call does what, for whom.

`Api.answer` takes a request and returns its answer, or raises RefusedError; it keeps no state of its own.
Called by the HTTP connections from the server's loop. Statuses, texts and the order of checks are
those of proxmox-backup 3.2.4.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pbsfs.base.names import BACKUP_TYPES, ROOT_NAMESPACE, Group, Namespace, Snapshot
from tests.support.server import parameters as p
from tests.support.server.accounts import ANY, AUDIT, BACKUP, READ, Accounts, owns
from tests.support.server.answers import OCTETS, Answer, RefusedError, Request, data
from tests.support.server.datastore import Datastore, os_error
from tests.support.server.releases import Release
from tests.support.server.tickets import PARTIAL

PREFIX = "/api2/json"
READER_PATH = f"{PREFIX}/reader"

_AUDIT = frozenset({AUDIT})
_READ = frozenset({READ})
_BACKUP = frozenset({BACKUP})

_MAX_DEPTH = "7"

_REALMS = [
    {"comment": "Linux PAM standard authentication", "default": True, "realm": "pam", "type": "pam"},
    {"comment": "Proxmox Backup authentication server", "realm": "pbs", "type": "pbs"},
]
_DIGEST = "2109f3c3fd14d088ff27ddb0a4c9210fada320c9e380b387e165112ed2a2ee42"

_NOWHERE = Path()

# In the order in which texts list what is missing.
_LISTED_SNAPSHOT = (p.STORE, p.NS, p.BACKUP_TIME, p.BACKUP_ID, p.BACKUP_TYPE)
_STORED_FILE = (p.BACKUP_ID, p.BACKUP_TIME, p.BACKUP_TYPE, p.FILE_NAME, p.NS, p.STORE)

Parameters = dict[str, str]
Handler = Callable[[str, Datastore, Parameters], Answer]


class Api:
    """`release`: what the server says it is; `ticket_in_cookie`: where a login's ticket is."""

    def __init__(
        self,
        accounts: Accounts,
        datastores: dict[str, Datastore],
        *,
        release: Release,
        ticket_in_cookie: bool = False,
    ) -> None:
        self._accounts = accounts
        self._datastores = datastores
        self._release = release
        self._ticket_in_cookie = ticket_in_cookie
        self._calls: dict[str, tuple[tuple[p.Parameter, ...], Handler]] = {
            "namespace": ((p.STORE, p.PARENT, p.MAX_DEPTH), self._namespaces),
            "groups": ((p.STORE, p.NS), self._groups),
            "snapshots": (
                (p.STORE, p.NS, p.optional(p.BACKUP_TYPE), p.optional(p.BACKUP_ID)),
                self._snapshots,
            ),
            "files": (_LISTED_SNAPSHOT, self._files),
            "download": (_STORED_FILE, self._download),
            "notes": (_LISTED_SNAPSHOT, self._notes),
            "status": ((p.STORE, p.VERBOSE), self._status),
            "gc": ((p.STORE,), self._gc),
        }

    def answer(self, request: Request, user: str | None) -> Answer:
        """The answer to a request of `user`, who is None where nobody was asked to log in."""
        path = request.path
        if path == f"{PREFIX}/access/ticket" and request.method == "POST":
            return self._log_in(request)
        if path == f"{PREFIX}/access/domains" and request.method == "GET":
            return Answer(200, json.dumps({"data": _REALMS, "digest": _DIGEST}).encode())
        if path == f"{PREFIX}/ping" and request.method == "GET":
            return data({"pong": True})
        assert user is not None
        if request.method == "GET":
            if path == f"{PREFIX}/version":
                p.verify(request.parameters, ())
                known_as = self._release
                told = {"release": known_as.release, "repoid": known_as.repoid, "version": known_as.version}
                return data(told)
            if path == f"{PREFIX}/admin/datastore":
                p.verify(request.parameters, ())
                return data(self._list(user))
            parts = path.removeprefix(f"{PREFIX}/admin/datastore/").split("/")
            if path.startswith(f"{PREFIX}/admin/datastore/") and len(parts) == 2 and parts[1] in self._calls:
                known, handler = self._calls[parts[1]]
                given = p.verify(request.parameters | {"store": parts[0]}, known)
                # Whether it exists is not told to who may not know: the handler asks first.
                store = self._datastores.get(parts[0])
                return handler(user, store or _missing(parts[0]), given)
        raise RefusedError(404, f"Path '{path}' not found.")

    def needs_login(self, request: Request) -> bool:
        return (request.method, request.path) not in (
            ("POST", f"{PREFIX}/access/ticket"),
            ("GET", f"{PREFIX}/access/domains"),
            ("GET", f"{PREFIX}/ping"),
        )

    def _log_in(self, request: Request) -> Answer:
        given = p.verify(request.parameters, (p.PASSWORD, p.TFA_CHALLENGE, p.USERNAME))
        user = given["username"]
        ticket = self._accounts.log_in(user, given["password"], given.get("tfa-challenge"))
        partial = ticket.startswith(f"PBS:{PARTIAL}")
        answer = {
            "CSRFPreventionToken": "invalid" if partial else self._accounts.tickets.csrf_token(user),
            "username": user,
        }
        if partial or not self._ticket_in_cookie:
            answer = answer | {"ticket": ticket}
            if not self._release.newer:
                return data(answer)
            body = {"data": answer, "status": 200, "success": True}
            return Answer(200, json.dumps(body).encode(), "application/json")
        cookie = f"__Host-PBSAuthCookie={ticket}; Secure; SameSite=Lax; HttpOnly; Path=/"
        shown = ticket.partition("::")[0] + "::ticket-in-cookie"
        return data(answer | {"ticket-info": shown}, headers=(("set-cookie", cookie),))

    def _list(self, user: str) -> list[dict[str, Any]]:
        paths = {name: f"/datastore/{name}" for name in self._datastores}
        more = {"backend-type": "filesystem", "mount-status": "nonremovable"} if self._release.newer else {}
        return [
            {"comment": None, "store": name} | more
            for name, path in paths.items()
            if self._accounts.any_below(user, path)
        ]

    def _namespaces(self, user: str, store: Datastore, given: Parameters) -> Answer:
        parent = Namespace.parse(given.get("parent", ""))
        allowed = self._accounts.privileges(user, store.acl_path(parent)) & ANY
        _check_exists(store)
        try:
            below = list(store.namespaces(parent, int(given.get("max-depth", _MAX_DEPTH))))
        except RefusedError:
            if allowed:
                raise
            raise RefusedError(403, "permission check failed") from None
        found = [{"ns": str(ns)} for ns in below if self._accounts.privileges(user, store.acl_path(ns)) & ANY]
        if not found and not allowed:
            raise RefusedError(403, "permission check failed")
        return data(found)

    def _groups(self, user: str, store: Datastore, given: Parameters) -> Answer:
        namespace = Namespace.parse(given.get("ns", ""))
        only_owned = self._accounts.require(user, store.acl_path(namespace), _AUDIT, _BACKUP)
        _check_exists(store)
        found = []
        for group in store.groups(namespace):
            owner = self._visible_owner(user, store, group, only_owned=only_owned)
            snapshots = list(store.snapshots(group))
            if owner is None or not (snapshots or self._release.newer):
                continue
            if not snapshots:
                found.append(_group(group, owner) | {"backup-count": 0, "files": [], "last-backup": 0})
                continue
            files = {snapshot: store.stored_files(snapshot) for snapshot in snapshots}
            last = snapshots[0]
            for snapshot in snapshots:
                if not ("index.json.blob" in files[last] and last.time > snapshot.time):
                    last = snapshot
            item = _group(group, owner) | {
                "backup-count": len(snapshots),
                "files": files[last],
                "last-backup": last.time,
            }
            notes = store.notes(group)
            found.append(item if notes is None else item | {"comment": notes})
        return data(found)

    def _visible_owner(self, user: str, store: Datastore, group: Group, *, only_owned: bool) -> str | None:
        """The owner of a group that `user` may see."""
        try:
            owner = store.owner(group)
        except RefusedError:
            return None
        return owner if not only_owned or owns(user, owner) else None

    def _snapshots(self, user: str, store: Datastore, given: Parameters) -> Answer:
        namespace = Namespace.parse(given.get("ns", ""))
        only_owned = self._accounts.require(user, store.acl_path(namespace), _AUDIT, _BACKUP)
        _check_exists(store)
        backup_type, backup_id = given.get("backup-type"), given.get("backup-id")
        if backup_id is None:
            groups = list(store.groups(namespace, backup_type))
        else:
            types = BACKUP_TYPES if backup_type is None else (backup_type,)
            groups = [Group(namespace, found, backup_id) for found in types]
        found = []
        for group in groups:
            owner = self._visible_owner(user, store, group, only_owned=only_owned)
            if owner is not None:
                found += [_listed(store, snapshot, owner) for snapshot in store.snapshots(group)]
        return data(found, streamed=True)

    def _files(self, user: str, store: Datastore, given: Parameters) -> Answer:
        snapshot = self._snapshot(user, store, given, _AUDIT | _READ)
        store.stored_files(snapshot)
        return data(store.manifest(snapshot)[1])

    def _notes(self, user: str, store: Datastore, given: Parameters) -> Answer:
        snapshot = self._snapshot(user, store, given, _AUDIT)
        return data((store.manifest(snapshot)[0].get("unprotected") or {}).get("notes", ""))

    def _download(self, user: str, store: Datastore, given: Parameters) -> Answer:
        snapshot = self._snapshot(user, store, given, _READ)
        try:
            content = store.read(store.snapshot_path(snapshot) / given["file-name"])
        except OSError as error:
            raise RefusedError(400, f"File open failed: {os_error(error)}") from None
        return Answer(200, content, OCTETS, streamed=True)

    def _snapshot(self, user: str, store: Datastore, given: Parameters, full: frozenset[str]) -> Snapshot:
        """The snapshot that is asked for, if `user` may look into it."""
        namespace = Namespace.parse(given.get("ns", ""))
        only_owned = self._accounts.require(user, store.acl_path(namespace), full, _BACKUP)
        _check_exists(store)
        snapshot = snapshot_of(given)
        if only_owned and not owns(user, owner := store.owner(snapshot.group)):
            raise RefusedError(400, f"backup owner check failed ({user} != {owner})")
        return snapshot

    def _status(self, user: str, store: Datastore, given: Parameters) -> Answer:
        path = store.acl_path(ROOT_NAMESPACE)
        if not self._accounts.any_below(user, path):
            raise RefusedError(403, "permission check failed")
        _check_exists(store)
        if not self._accounts.privileges(user, path) & (_AUDIT | _BACKUP):
            return data({"avail": 0, "total": 0, "used": 0})
        space = os.statvfs(store.path)
        total, free = space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize
        return data({"avail": free, "total": total, "used": total - free})

    def _gc(self, user: str, store: Datastore, given: Parameters) -> Answer:
        self._accounts.require(user, store.acl_path(ROOT_NAMESPACE), _AUDIT, frozenset())
        _check_exists(store)
        noted: dict[str, Any] = {"store": given["store"], "disk-bytes": 0, "index-data-bytes": 0}
        try:
            noted |= json.loads(store.read(store.path / ".gc-status"))
        except OSError:
            return data(noted)  # there was none
        return data(noted | {"last-run-state": "OK", "schedule": "daily"})

    # --- the reader protocol's first step

    def reader_snapshot(self, request: Request, user: str, protocol: str) -> tuple[Datastore, Snapshot]:
        """What a session is to be opened on, once all is checked but the lock. Raises RefusedError."""
        known = (p.BACKUP_ID, p.BACKUP_TIME, p.BACKUP_TYPE, p.DEBUG, p.NS, p.STORE)
        given = p.verify(request.parameters, known)
        namespace = Namespace.parse(given.get("ns", ""))
        store = self._datastores.get(given["store"]) or _missing(given["store"])
        path = store.acl_path(namespace)
        held = self._accounts.privileges(user, path)
        if not held & {READ, BACKUP}:
            raise RefusedError(400, f"no permissions on {path}")
        _check_exists(store)
        snapshot = snapshot_of(given)
        if "upgrade" not in request.headers:
            raise RefusedError(400, "missing Upgrade header")
        if request.headers["upgrade"] != protocol:
            raise RefusedError(400, "invalid protocol name")
        if READ not in held and not owns(user, store.owner(snapshot.group)):
            raise RefusedError(400, "backup owner check failed!")
        if not store.exists(snapshot):
            name = f"{snapshot.group.type}/{snapshot.group.id}/{snapshot.time_text}"
            raise RefusedError(400, f"snapshot {name} does not exist.")
        return store, snapshot


def _group(group: Group, owner: str) -> dict[str, Any]:
    return {"backup-id": group.id, "backup-type": group.type, "owner": owner}


def snapshot_of(given: Parameters) -> Snapshot:
    """The snapshot that parameters name."""
    namespace = Namespace.parse(given.get("ns", ""))
    return Group(namespace, given["backup-type"], given["backup-id"]).snapshot(int(given["backup-time"]))


def _listed(store: Datastore, snapshot: Snapshot, owner: str) -> dict[str, Any]:
    """A snapshot as it is listed; without sizes where it has no readable manifest."""
    item: dict[str, Any] = {
        "backup-id": snapshot.group.id,
        "backup-time": snapshot.time,
        "backup-type": snapshot.group.type,
        "owner": owner,
        "protected": store.is_protected(snapshot),
    }
    try:
        manifest, files = store.manifest(snapshot)
    except RefusedError:
        return item | {"files": [{"filename": name} for name in store.stored_files(snapshot)]}
    item |= {"files": files, "size": sum(file.get("size", 0) for file in files)}
    unprotected = manifest.get("unprotected") or {}
    if notes := unprotected.get("notes"):
        item["comment"] = notes.split("\n", 1)[0]
    if fingerprint := unprotected.get("key-fingerprint"):
        item["fingerprint"] = fingerprint
    if verification := unprotected.get("verify_state"):
        item["verification"] = {name: verification[name] for name in ("state", "upid")}
    return item


def _missing(name: str) -> Datastore:
    """Stands for a datastore that does not exist, so that privileges are looked at first."""
    return Datastore(name, _NOWHERE, "")


def _check_exists(store: Datastore) -> None:
    if store.path == _NOWHERE:
        raise RefusedError(400, f"no such datastore '{store.name}'")
