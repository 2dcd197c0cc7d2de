"""The server as a source: what all sources promise, what it lists and reads, and for whom."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from pbsfs.base.errors import (
    AuthError,
    ForbiddenError,
    KeyRequiredError,
    NotFoundError,
    SourceError,
    UnknownDatastoreError,
    WrongServerError,
)
from pbsfs.base.names import CLIENT_LOG, MANIFEST, ROOT_NAMESPACE, Archive, Group, Namespace
from pbsfs.base.secret import Secret
from pbsfs.formats.manifest import CryptMode
from pbsfs.reader.reader import Reader
from pbsfs.sources.base import GroupInfo, SnapshotInfo, Source
from pbsfs.sources.directory.source import DirectorySource
from pbsfs.sources.http.tls import Trust, parse_fingerprint
from pbsfs.sources.server.limits import DEFAULT, ServerLimits
from pbsfs.sources.server.repository import Repository
from pbsfs.sources.server.source import ServerSource
from pbsfs.testing.writer import DatastoreWriter
from pbsfs.tree import BlobFile, Directory, ImageFile, Tree
from tests.sources.conformance import SourceConformance
from tests.sources.server import serving
from tests.sources.server.serving import FIRST, SECOND, TOKEN, USER, VM, opened, reading, source_of
from tests.support import golden, made
from tests.support.golden import Original
from tests.support.made import DAY, KEY, TIME
from tests.support.server import NOTHING, OWN_GROUPS, READER, ReferenceServer
from tests.support.server.accounts import READ
from tests.support.server.faults import Body
from tests.support.server.releases import PBS_4

PROD = Namespace.parse("prod")
DEEP = Namespace.parse("prod/db")

as_anybody = pytest.mark.parametrize("auth_id", [USER, TOKEN], ids=["password", "token"])


NOTHING_KEPT = ServerLimits(namespaces_kept=0)


class ServerConformance(SourceConformance):
    auth_id: str

    @asynccontextmanager
    async def open(self, datastore: Path) -> AsyncIterator[Source]:
        with serving.served(datastore) as server:
            async with opened(source_of(server, self.auth_id, limits=NOTHING_KEPT)) as source:
                yield source
            await serving.until(lambda: not server.open_sessions())


class TestServerSourceWithPassword(ServerConformance):
    """What every source promises."""

    auth_id = USER


class TestServerSourceWithToken(ServerConformance):
    """What every source promises."""

    auth_id = TOKEN


# --- lists


async def everything(source: Source, namespace: Namespace = ROOT_NAMESPACE) -> list[object]:
    """All that a source lists, but for what only some sources' lists know."""
    found: list[object] = []
    for info in await source.groups(namespace):
        found.append(_known_to_all(info))
        found += [_as_listed(snapshot) for snapshot in await source.snapshots(info.group)]
    for below in await source.namespaces(namespace):
        found += [below, *(await everything(source, below))]
    return found


def _known_to_all(info: GroupInfo) -> GroupInfo:
    return replace(info, notes=None)


def _as_listed(info: SnapshotInfo) -> SnapshotInfo:
    files = [replace(f, csum=None, size=0 if f.archive == CLIENT_LOG else f.size) for f in info.files]
    # The server calls the manifest signed where it has a signature; what reads it does not care.
    files = [replace(f, crypt_mode=None) if f.archive == MANIFEST else f for f in files]
    files.sort(key=lambda file: file.archive.filename)
    # The server's list has the first line of the notes.
    notes = (info.notes or "").split("\n", 1)[0] or None
    return replace(info, files=tuple(files), notes=notes)


def assert_lists_alike(server: ReferenceServer, path: Path, auth_id: str) -> int:
    async def main() -> int:
        expected = await everything(DirectorySource(path))
        async with opened(source_of(server, auth_id)) as source:
            found = await everything(source)
        assert found == expected
        return len(found)

    return trio.run(main)


@as_anybody
def test_a_server_lists_what_its_directory_holds(tmp_path: Path, auth_id: str) -> None:
    writer = DatastoreWriter(tmp_path / "datastore")
    for namespace in (ROOT_NAMESPACE, PROD, DEEP):
        for number in range(3):
            writer.add_snapshot(
                made.snapshot(time=TIME + number * DAY, namespace=namespace),
                {"a.img.fidx": made.image(number, "r0t"), "b.conf.blob": b"text"},
                chunk_size=1 << 16,
                crypt_mode=CryptMode.ENCRYPT if number == 1 else CryptMode.NONE,
                key=KEY if number == 1 else None,
                notes="two\nlines" if number else None,
                verify_state="ok" if number else None,
                protected=number == 2,
                client_log=b"log" if number else None,
            )
    with serving.served(writer.path) as server:
        assert assert_lists_alike(server, writer.path, auth_id) == 3 * 4 + 2


@pytest.mark.golden
@as_anybody
def test_a_server_lists_the_golden_datastore_as_its_directory_does(auth_id: str) -> None:
    with serving.served(golden.DATASTORE) as server:
        assert assert_lists_alike(server, golden.DATASTORE, auth_id) > 10


async def names(tree: Tree, path: str) -> list[str]:
    node = await tree.find(path)
    assert isinstance(node, Directory)
    return [name.decode() for name in await node.children()]


def test_a_new_snapshot_appears_in_the_tree_and_a_forgotten_one_goes(tmp_path: Path) -> None:
    path = serving.fill(tmp_path / "datastore")

    async def main() -> list[list[str]]:
        with serving.served(path) as server:
            async with reading(source_of(server)) as reader:
                tree = Tree(reader, refresh=0)
                found = [await names(tree, "vm/100")]
                writer = DatastoreWriter(path)
                writer.add_snapshot(VM.snapshot(TIME + 2 * DAY), {"a.img.fidx": b"new"})
                found.append(await names(tree, "vm/100"))
                shutil.rmtree(writer.snapshot_path(FIRST))
                found.append(await names(tree, "vm/100"))
                return found

    first, second, third = ["2023-11-14T22:13:20Z", "2023-11-15T22:13:20Z", "2023-11-16T22:13:20Z"]
    assert trio.run(main) == [
        [first, second, "latest"],
        [first, second, third, "latest"],
        [second, third, "latest"],
    ]


def test_an_entry_that_makes_no_sense_is_told_of_once_and_hides_no_other(
    server: ReferenceServer, caplog: pytest.LogCaptureFixture
) -> None:
    def add_one(body: bytes) -> bytes:
        groups = json.loads(body)["data"]
        return json.dumps({"data": [{**groups[0], "backup-type": "tape"}, None, *groups]}).encode()

    server.faults.add(Body(match="/groups", times=2, make=add_one))

    async def main() -> None:
        async with opened(source_of(server)) as source:
            for _turn in range(2):
                assert [info.group for info in await source.groups(ROOT_NAMESPACE)] == [VM]

    trio.run(main)
    (line,) = caplog.messages
    assert "the groups of '': left out 2 entries of the server's list: " in line
    caplog.clear()


def test_a_group_without_snapshots_is_empty_and_one_that_does_not_exist_is_not_found(tmp_path: Path) -> None:
    path = serving.fill(tmp_path / "datastore")
    empty = Group(ROOT_NAMESPACE, "vm", "199")
    (path / str(empty)).mkdir()
    (path / str(empty) / "owner").write_text("root@pam")

    async def main() -> None:
        with ReferenceServer(path, release=PBS_4) as server:
            server.add_user(USER, serving.PASSWORD)
            async with opened(source_of(server)) as source:
                assert await source.snapshots(empty) == []
                (_vm, info) = await source.groups(ROOT_NAMESPACE)
                assert (info.group, info.snapshot_count, info.last_backup) == (empty, 0, None)
                server.requests.clear()
                assert await source.snapshots(empty) == []
                assert server.requests.count() == 1
                with pytest.raises(NotFoundError, match="there is no group vm/198"):
                    await source.snapshots(Group(ROOT_NAMESPACE, "vm", "198"))

    trio.run(main)


def test_a_backup_that_runs_is_not_a_groups_last_one(tmp_path: Path) -> None:
    path = serving.fill(tmp_path / "datastore")
    for running in (VM.snapshot(TIME + 9 * DAY), made.snapshot("first")):
        (path / str(running)).mkdir(parents=True)
        (path / str(running.group) / "owner").write_text("root@pam")
        (path / str(running) / "a.img.fidx").write_bytes(b"")

    async def main() -> None:
        with serving.served(path) as server:
            async with opened(source_of(server)) as source:
                found = {info.group.id: info for info in await source.groups(ROOT_NAMESPACE)}
        assert (found["100"].last_backup, found["100"].snapshot_count) == (SECOND.time, 3)
        assert found["first"].last_backup is None

    trio.run(main)


def test_a_large_list_is_parsed_beside_the_loop_and_one_without_bounds_is_refused(
    server: ReferenceServer,
) -> None:
    threads: list[int] = []

    def parse(data: object) -> object:
        threads.append(threading.get_ident())
        return data

    async def ask(limits: ServerLimits) -> object:
        source = source_of(server, TOKEN, limits=limits)
        try:
            return await source.api.get("/admin/datastore/golden/groups", {}, parse)
        finally:
            await source.aclose()

    async def main() -> None:
        assert await ask(DEFAULT) == await ask(ServerLimits(parse_at_once=10))
        with pytest.raises(WrongServerError, match="more than 3 values"):
            await ask(ServerLimits(parse_at_once=10, max_values=3))

    trio.run(main)
    assert threads[0] == threading.get_ident() != threads[1]
    assert len(threads) == 2


# --- who may see what


@pytest.fixture
def namespaces(tmp_path: Path) -> Path:
    """A snapshot in the root and in each of two namespaces, and one in a namespace that is nobody's."""
    writer = DatastoreWriter(tmp_path / "datastore")
    for namespace in (ROOT_NAMESPACE, PROD, DEEP, Namespace.parse("other")):
        writer.add_snapshot(
            made.snapshot(namespace=namespace),
            {"a.img.fidx": serving.NEWER_CONTENT},
            chunk_size=serving.CHUNK,
        )
    return writer.path


def with_limited_token(server: ReferenceServer, where: str) -> None:
    server.add_token("reader@pbs!limited", serving.SECRET, grants={f"/datastore/golden/{where}": READER})


def test_a_token_for_one_namespace_sees_that_and_the_rest_is_left_out_with_one_line(
    namespaces: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        with serving.served(namespaces) as server:
            with_limited_token(server, "prod")
            async with reading(source_of(server, "reader@pbs!limited")) as reader:
                tree = Tree(reader, refresh=0)
                for _turn in range(3):
                    assert await names(tree, "") == ["ns"]
                    assert await names(tree, "ns") == ["prod"]
                    assert await names(tree, "ns/prod") == ["vm", "ns"]
                node = await tree.find("ns/prod/ns/db/vm/100/latest/a.img")
                assert isinstance(node, ImageFile)
                image = await node.open()
                assert await image.read(0, image.size) == serving.NEWER_CONTENT

    trio.run(main)
    (line,) = caplog.messages
    assert "left out" in line
    assert "permission check failed" in line
    caplog.clear()


def test_a_token_for_a_nested_namespace_finds_the_way_to_it(
    namespaces: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        with serving.served(namespaces) as server:
            with_limited_token(server, "prod/db")
            async with reading(source_of(server, "reader@pbs!limited")) as reader:
                tree = Tree(reader)
                assert await names(tree, "") == ["ns"]
                assert await names(tree, "ns/prod") == ["ns"]
                assert await names(tree, "ns/prod/ns/db/vm/100/latest") == ["a.img", "index.json"]

    trio.run(main)
    assert len(caplog.messages) == 2  # the root and prod have something that is not shown
    caplog.clear()


def test_what_a_limited_token_may_not_see_is_forbidden_and_not_retried(namespaces: Path) -> None:
    hidden = made.snapshot()

    async def main() -> None:
        with serving.served(namespaces) as server:
            with_limited_token(server, "prod")
            async with opened(source_of(server, "reader@pbs!limited")) as source:
                image = Archive("a.img.fidx")
                calls: list[Callable[[], object]] = [
                    lambda: source.groups(ROOT_NAMESPACE),
                    lambda: source.snapshots(hidden.group),
                    lambda: source.fetch_file(hidden, image, 1 << 20),
                    lambda: source.fetch_file(hidden, Archive("index.json.blob"), 1 << 20),
                ]
                for call in calls:
                    server.requests.clear()
                    with pytest.raises(ForbiddenError, match="does not allow reader@pbs!limited to do this"):
                        await call()  # type: ignore[misc]
                    assert server.requests.count() == 1

    trio.run(main)


def test_a_token_that_only_owns_groups_sees_and_reads_those(tmp_path: Path) -> None:
    writer = DatastoreWriter(tmp_path / "datastore")
    owner = "reader@pbs!owner"
    mine, other = made.snapshot("1"), made.snapshot("2")
    for snapshot, who in [(mine, owner), (other, "root@pam")]:
        writer.add_snapshot(
            snapshot,
            {"a.img.fidx": serving.NEWER_CONTENT, "c.conf.blob": b"text"},
            chunk_size=serving.CHUNK,
            owner=who,
        )

    async def main() -> None:
        with serving.served(writer.path) as server:
            server.add_user(USER, serving.PASSWORD, grants={"/datastore/golden": READER | OWN_GROUPS})
            server.add_token(owner, serving.SECRET, grants={"/datastore/golden": OWN_GROUPS})
            async with reading(source_of(server, owner)) as reader:
                tree = Tree(reader)
                assert await names(tree, "vm") == ["1"]
                file = await tree.find("vm/1/latest/a.img")
                text = await tree.find("vm/1/latest/c.conf")
                assert isinstance(file, ImageFile)
                assert isinstance(text, BlobFile)
                assert await serving.read_all(await file.open()) == serving.NEWER_CONTENT
                assert await text.read() == b"text"
                with pytest.raises((ForbiddenError, NotFoundError)):
                    await reader.source.fetch_file(other, Archive("a.img.fidx"), 1 << 20)

    trio.run(main)


async def open_and_close(source: ServerSource) -> None:
    async with opened(source):
        pass


def test_who_may_see_nothing_of_the_datastore_is_told_so_at_the_start(server: ReferenceServer) -> None:
    server.add_token("reader@pbs!none", serving.SECRET, grants={"/datastore/golden": NOTHING})
    with pytest.raises(UnknownDatastoreError, match="'golden' that reader@pbs!none may see; there is: none"):
        trio.run(open_and_close, source_of(server, "reader@pbs!none"))


def test_a_datastore_that_may_be_a_port_is_hinted_at(
    server: ReferenceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", server.port))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_a, **_o: [place])
    source = ServerSource(
        Repository.parse(f"{USER}@localhost:18007"),
        Secret(serving.PASSWORD),
        Trust(pinned=parse_fingerprint(server.fingerprint)),
    )
    expected = "has no datastore '18007' .*; if 18007 is the port, write reader@pbs@localhost:18007:DATASTORE"
    with pytest.raises(UnknownDatastoreError, match=expected):
        trio.run(open_and_close, source)


def test_a_wrong_secret_is_told_at_the_start_in_the_servers_words(server: ReferenceServer) -> None:
    for auth_id, words in [(USER, "permission check failed"), (TOKEN, "invalid credentials")]:
        with pytest.raises(AuthError, match=words):
            trio.run(open_and_close, source_of(server, auth_id, "wrong"))


def test_who_may_list_but_not_read_sees_the_lists_and_is_refused_the_bytes(server: ReferenceServer) -> None:
    server.add_token("reader@pbs!auditor", serving.SECRET, grants={"/datastore/golden": READER - {READ}})

    async def main() -> None:
        async with opened(source_of(server, "reader@pbs!auditor")) as source:
            assert [info.snapshot for info in await source.snapshots(VM)] == [FIRST, SECOND]
            for archive in (serving.IMAGE, serving.CONFIG):
                with pytest.raises(ForbiddenError):
                    await source.fetch_file(FIRST, archive, 1 << 20)

    trio.run(main)


# --- reading


@as_anybody
def test_every_file_of_a_snapshot_reads_as_what_was_backed_up(server: ReferenceServer, auth_id: str) -> None:
    contents = {
        "drive-scsi0.img": serving.CONTENT,
        "drive-scsi1.img": serving.OTHER_CONTENT,
        "root.pxar": serving.STREAM_CONTENT,
        "qemu-server.conf": serving.CONFIG_CONTENT,
    }

    async def main() -> dict[str, bytes]:
        async with reading(source_of(server, auth_id)) as reader:
            tree = Tree(reader)
            return {name: await content(tree, f"vm/100/{FIRST.time_text}/{name}") for name in contents}

    assert trio.run(main) == contents


async def content(tree: Tree, path: str) -> bytes:
    node = await tree.find(path)
    if isinstance(node, BlobFile):
        return await node.read()
    assert isinstance(node, ImageFile)
    return await serving.read_all(await node.open())


def test_an_encrypted_snapshot_reads_with_its_key_and_not_without(tmp_path: Path) -> None:
    writer = DatastoreWriter(tmp_path / "datastore")
    files = {"a.img.fidx": serving.CONTENT, "c.conf.blob": b"text"}
    writer.add_snapshot(FIRST, files, chunk_size=serving.CHUNK, crypt_mode=CryptMode.ENCRYPT, key=KEY)

    async def main() -> None:
        with serving.served(writer.path) as server:
            async with reading(source_of(server), {KEY.fingerprint: KEY}) as reader:
                assert await content(Tree(reader), "vm/100/latest/a.img") == serving.CONTENT
                assert await content(Tree(reader), "vm/100/latest/c.conf") == b"text"
            async with reading(source_of(server)) as reader:
                for name in ("a.img", "c.conf"):
                    with pytest.raises(KeyRequiredError):
                        await content(Tree(reader), f"vm/100/latest/{name}")

    trio.run(main)


def test_a_list_that_contradicts_the_manifest_is_an_error_and_never_believed(server: ReferenceServer) -> None:
    size = f'"size":{len(serving.CONTENT)}'.encode()
    spaced = size.replace(b":", b": ")

    def shorten(body: bytes) -> bytes:
        assert size in body or spaced in body
        return body.replace(size, b'"size":65536').replace(spaced, b'"size": 65536')

    server.faults.add(Body(match="/snapshots", make=shorten))

    async def main() -> None:
        async with reading(source_of(server)) as reader:
            with pytest.raises(SourceError, match="the manifest differs from the listing"):
                await serving.image_of(reader)

    trio.run(main)


PIECE = 8 << 20


async def sum_of(reader: Reader, original: Original) -> str:
    node = await Tree(reader).find(original.path)
    digest = hashlib.sha256()
    if isinstance(node, BlobFile):
        digest.update(await node.read())
    else:
        assert isinstance(node, ImageFile)
        handle = (await node.open()).handle()
        for offset in range(0, original.size, PIECE):
            digest.update(await handle.read(offset, PIECE))
        handle.close()
    return digest.hexdigest()


@pytest.mark.golden
@as_anybody
def test_every_golden_file_reads_as_what_was_backed_up(auth_id: str) -> None:
    originals = [original for original in golden.originals() if not original.encrypted]
    assert originals

    async def main() -> None:
        with serving.served(golden.DATASTORE) as server:
            async with reading(source_of(server, auth_id)) as reader:
                for original in originals:
                    assert await sum_of(reader, original) == original.sha256, original.path

    trio.run(main)


@pytest.mark.golden
def test_every_encrypted_golden_file_reads_with_the_key() -> None:
    key = golden.plain_key()
    originals = [original for original in golden.originals() if original.key == "plain"]
    assert originals

    async def main() -> None:
        with serving.served(golden.DATASTORE) as server:
            async with reading(source_of(server), {key.fingerprint: key}) as reader:
                for original in originals:
                    assert await sum_of(reader, original) == original.sha256, original.path

    trio.run(main)
