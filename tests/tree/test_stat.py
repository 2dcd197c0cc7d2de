"""What a stat and the facts of a node say, and how exact they are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pbsfs.base.errors import DamageError, KeyRequiredError, NotFoundError, SourceError
from pbsfs.base.names import Archive, Namespace
from pbsfs.formats.manifest import CryptMode
from pbsfs.sources.base import FileInfo, GroupInfo, SnapshotInfo
from pbsfs.tree import BlobFile, ImageFile, SnapshotDirectory
from tests.support import made
from tests.support.made import DAY, TIME
from tests.support.run import in_trio
from tests.support.sources import CHUNK_SIZE, MemorySource
from tests.tree.trees import (
    CONF,
    CONTENT,
    DATA_SIZE,
    DAYS,
    DEEP,
    FILES,
    IMAGE,
    directory_stat,
    file_stat,
    filled,
    image,
    latest,
    shown,
    small_file,
)


@in_trio
async def test_directories_have_the_time_of_the_newest_backup_inside() -> None:
    async with shown(filled()) as tree:
        assert await tree.root.stat() == directory_stat()
        assert await (await tree.find("vm")).stat() == directory_stat(TIME + DAY)
        assert await (await tree.find("vm/100")).stat() == directory_stat(TIME + DAY)
        assert await (await tree.find(f"vm/100/{DAYS[0]}")).stat() == directory_stat(TIME)
        assert await (await tree.find("ns")).stat() == directory_stat()
        assert await (await tree.find("ns/prod")).stat() == directory_stat()


@in_trio
async def test_a_node_is_found_at_its_path_without_following_links() -> None:
    async with shown(filled()) as tree:
        assert await tree.at(b"") is tree.root
        for path in ("vm", "vm/100", "vm/100/latest", f"vm/100/{DAYS[0]}/index.json", "ns/prod"):
            assert (await tree.at(path.encode())).path == path.encode()
        for path in ("vm/9", f"vm/100/{DAYS[0]}/index.json/x", "vm/100/latest/index.json"):
            with pytest.raises(NotFoundError):
                await tree.at(path.encode())


@in_trio
async def test_a_type_without_any_backup_has_no_time() -> None:
    class Empty(MemorySource):
        async def groups(self, namespace: Namespace) -> list[GroupInfo]:
            return [replace(info, last_backup=None) for info in await super().groups(namespace)]

    source = Empty()
    source.add(made.snapshot(), FILES)
    async with shown(source) as tree:
        assert (await (await tree.find("vm")).stat()).mtime_ns is None
        assert (await (await tree.find("vm/100")).stat()).mtime_ns is None


@in_trio
async def test_a_cheap_source_tells_exact_sizes_at_once_and_is_asked_once() -> None:
    source = filled()
    async with shown(source) as tree:
        disk = await tree.find(f"vm/100/{DAYS[0]}/{IMAGE}")
        conf = await tree.find(f"vm/100/{DAYS[0]}/qemu-server.conf")
        for _ in range(2):
            assert await disk.stat() == file_stat(len(CONTENT), DATA_SIZE, TIME)
            assert await conf.stat() == file_stat(len(CONF), len(CONF), TIME)
    assert source.calls["fetch_file"] == 2
    assert source.calls["fetch_chunk"] == 0


@in_trio
async def test_a_dear_source_is_asked_for_blobs_at_a_stat_and_for_images_when_they_are_opened() -> None:
    source = filled(cheap_files=False)
    async with shown(source) as tree:
        disk = await image(tree, f"vm/100/{DAYS[0]}/{IMAGE}")
        conf = await small_file(tree, f"vm/100/{DAYS[0]}/qemu-server.conf")
        manifest = await small_file(tree, f"vm/100/{DAYS[0]}/index.json")
        log = await small_file(tree, f"host/9/{DAYS[0]}/client.log")
        assert await disk.stat() == file_stat(len(CONTENT), len(CONTENT), TIME, exact=False)
        stored = conf.file.size
        assert await conf.glance() == file_stat(stored, stored, TIME, exact=False)
        assert source.calls["fetch_file"] == 0
        assert await conf.stat() == await conf.glance() == file_stat(len(CONF), len(CONF), TIME)
        size = len(await manifest.read())
        assert await manifest.stat() == file_stat(size, size, TIME)
        assert await log.stat() == file_stat(4, 4, TIME)
        await disk.open()
        assert await disk.stat() == file_stat(len(CONTENT), DATA_SIZE, TIME)


@pytest.mark.parametrize("filename", [f"{IMAGE}.fidx", "qemu-server.conf.blob"])
@in_trio
async def test_a_damaged_file_has_a_stat_and_opening_it_says_what_is_wrong(filename: str) -> None:
    source = filled()
    snapshot = made.snapshot("100")
    source.files[snapshot, Archive(filename)] = b"rubbish"
    async with shown(source) as tree:
        node = await tree.find(f"vm/100/{DAYS[0]}/{filename}")
        assert isinstance(node, (BlobFile, ImageFile))
        assert await node.stat() == file_stat(node.file.size, node.file.size, TIME)
        await node.facts()
        with pytest.raises(DamageError):
            await (node.open() if isinstance(node, ImageFile) else node.read())


@in_trio
async def test_a_file_that_was_repaired_has_an_exact_stat_once_it_is_opened() -> None:
    source = filled()
    place = made.snapshot("100"), Archive(f"{IMAGE}.fidx")
    whole = source.files[place]
    source.files[place] = b"rubbish"
    async with shown(source) as tree:
        disk = await image(tree, f"vm/100/{DAYS[0]}/{IMAGE}")
        await disk.stat()
        source.files[place] = whole
        await disk.open()
        assert await disk.stat() == file_stat(len(CONTENT), DATA_SIZE, TIME)


@in_trio
async def test_a_source_that_fails_during_a_stat_is_asked_again_by_the_next() -> None:
    source = filled()
    async with shown(source) as tree:
        disk = await tree.find(f"vm/100/{DAYS[0]}/{IMAGE}")
        source.fail("fetch_file", SourceError("no answer"))
        assert await disk.stat() == file_stat(len(CONTENT), len(CONTENT), TIME, exact=False)
        assert await disk.stat() == file_stat(len(CONTENT), DATA_SIZE, TIME)


@in_trio
async def test_an_encrypted_file_without_its_key_has_a_stat_and_cannot_be_opened() -> None:
    source = MemorySource()
    source.add(made.snapshot(), FILES, crypt_mode=CryptMode.ENCRYPT, key=made.KEY)
    async with shown(source) as tree:
        disk = await image(tree, f"vm/100/latest/{IMAGE}")
        assert await disk.stat() == file_stat(len(CONTENT), len(CONTENT), TIME)
        with pytest.raises(KeyRequiredError, match=made.KEY.fingerprint):
            await disk.open()
        conf = await small_file(tree, "vm/100/latest/qemu-server.conf")
        assert (await conf.stat()).size == conf.file.size
        with pytest.raises(KeyRequiredError, match=made.KEY.fingerprint):
            await conf.read()
    async with shown(source, with_key=True) as tree:
        assert await (await tree.find(f"vm/100/latest/{IMAGE}")).stat() == file_stat(
            len(CONTENT), DATA_SIZE, TIME
        )
        assert (await (await tree.find("vm/100/latest/qemu-server.conf")).stat()).size == len(CONF)


@in_trio
async def test_facts_tell_what_people_ask_about_a_node() -> None:
    source = MemorySource()
    source.add(
        made.snapshot(namespace=DEEP),
        FILES,
        crypt_mode=CryptMode.ENCRYPT,
        key=made.KEY,
        notes="before the upgrade",
        verify_state="ok",
        protected=True,
    )
    group = {"namespace": "prod/db", "backup_type": "vm", "backup_id": "100", "owner": "root@pam"}
    snapshot = group | {
        "backup_time": DAYS[0],
        "protected": "true",
        "key_fingerprint": made.KEY.fingerprint,
        "verify_state": "ok",
        "notes": "before the upgrade",
    }
    async with shown(source, with_key=True) as tree:

        async def facts(path: str) -> dict[str, str]:
            return await (await tree.find(path)).facts()

        top = "ns/prod/ns/db"
        assert await facts(top) == {"namespace": "prod/db"}
        assert await facts("ns") == {"namespace": ""}
        assert await facts(f"{top}/vm") == {"namespace": "prod/db", "backup_type": "vm"}
        assert await facts(f"{top}/vm/100") == group | {"backup_count": "1", "last_backup": DAYS[0]}
        node = await tree.find(f"{top}/vm/100/latest")
        assert isinstance(node, SnapshotDirectory)
        size = sum(file.size for file in node.info.files)
        assert await node.facts() == snapshot | {"size": str(size), "crypt_mode": "encrypt"}
        assert await facts(f"{top}/vm/100/latest/{IMAGE}") == snapshot | {
            "archive": f"{IMAGE}.fidx",
            "crypt_mode": "encrypt",
            "size": str(len(CONTENT)),
            "chunk_size": str(CHUNK_SIZE),
        }
        assert await facts(f"{top}/vm/100/latest/qemu-server.conf") == snapshot | {
            "archive": "qemu-server.conf.blob",
            "crypt_mode": "encrypt",
            "size": str(len(CONF)),
        }
        assert await (await latest(tree, f"{top}/vm/100")).facts() == {}


@in_trio
async def test_facts_of_a_snapshot_tell_where_its_files_differ() -> None:
    source = MemorySource()
    info = source.add(made.snapshot(), {"a.img.fidx": b"a", "b.img.fidx": b"b"})
    files = [
        replace(file, crypt_mode=CryptMode.ENCRYPT) if n == 0 else file for n, file in enumerate(info.files)
    ]
    source.infos[made.snapshot()] = replace(info, files=tuple(files))
    log = FileInfo(Archive("client.log.blob"), 5, None)
    source.infos[made.snapshot("101")] = SnapshotInfo(made.snapshot("101"), (log,))
    async with shown(source) as tree:
        facts = await (await tree.find("vm/100/latest")).facts()
        assert facts["crypt_mode"] == "mixed"
        assert facts["protected"] == "false"
        assert facts["verify_state"] == "none"
        assert "notes" not in facts
        assert "crypt_mode" not in await (await tree.find("vm/101/latest")).facts()


@in_trio
async def test_facts_of_a_file_on_a_dear_source_open_nothing() -> None:
    source = filled(cheap_files=False)
    async with shown(source) as tree:
        facts = await (await tree.find(f"vm/100/latest/{IMAGE}")).facts()
        assert facts["size"] == str(len(CONTENT))
        assert "chunk_size" not in facts
    assert source.calls["fetch_file"] == 0
