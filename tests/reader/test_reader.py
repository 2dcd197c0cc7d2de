"""Opening what a snapshot holds: sharing, checks against the manifest, blobs, keys, the end."""

from __future__ import annotations

import gc
import hashlib
import math
import random
from dataclasses import replace

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from pbsfs.base.errors import DamageError, KeyRequiredError, SourceError
from pbsfs.base.names import CLIENT_LOG, MANIFEST, MASTER_KEY_BLOB, ROOT_NAMESPACE, Archive
from pbsfs.formats import blob, index
from pbsfs.formats.manifest import CryptMode, Manifest
from pbsfs.reader.reader import Reader, open_reader
from pbsfs.sources.base import FileInfo, SnapshotInfo
from pbsfs.sources.directory.source import DirectorySource
from pbsfs.testing.writer import DatastoreWriter
from tests.support import golden, made
from tests.support.run import in_trio
from tests.support.sources import CHUNK_SIZE, MemorySource, file_of

NAME = "disk.img.fidx"
CONF = "qemu-server.conf.blob"
SNAPSHOT = made.snapshot()
CONTENT = made.image(1, "r0t", tail=512)
KEYS = {made.KEY.fingerprint: made.KEY}


def stored(mode: CryptMode = CryptMode.NONE) -> tuple[MemorySource, SnapshotInfo]:
    source = MemorySource()
    key = None if mode is CryptMode.NONE else made.KEY
    files = {NAME: CONTENT, CONF: b"cores: 2\n" * 50, "tiny.blob": b"x"}
    return source, source.add(SNAPSHOT, files, crypt_mode=mode, key=key, client_log=b"all is well\n" * 9)


# --- images


def listed_by_a_server(info: SnapshotInfo) -> SnapshotInfo:
    """`info` without checksums, which a server's listing does not have."""
    return replace(info, files=tuple(replace(file, csum=None) for file in info.files))


@in_trio
async def test_ten_who_open_an_image_at_once_fetch_the_manifest_once() -> None:
    source, info = stored()
    info = listed_by_a_server(info)
    for max_age in (math.inf, 5.0, 0.0):
        source.calls.clear()
        gate = source.hold("fetch_file")
        async with open_reader(source) as reader, trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(reader.open_image, info, file_of(info, NAME), max_age)
            await wait_all_tasks_blocked()
            assert source.calls["fetch_file"] == 1
            gate.set()


@in_trio
async def test_all_who_wait_for_a_manifest_share_its_failure() -> None:
    source, info = stored()
    info = listed_by_a_server(info)
    gate = source.hold("fetch_file")
    source.fail("fetch_file", SourceError("no answer"))

    async def look() -> None:
        with pytest.raises(SourceError, match="no answer"):
            await reader.version(info.snapshot, math.inf)

    async with open_reader(source) as reader:
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(look)
            await wait_all_tasks_blocked()
            gate.set()
        assert source.calls["fetch_file"] == 1
        assert await reader.version(info.snapshot, math.inf)


@in_trio
async def test_who_gives_up_waiting_for_a_manifest_does_not_spoil_it_for_the_others() -> None:
    source, info = stored()
    info = listed_by_a_server(info)
    gate = source.hold("fetch_file")
    async with open_reader(source) as reader, trio.open_nursery() as nursery:
        with trio.move_on_after(1) as scope:
            await reader.open_image(info, file_of(info, NAME))
        assert scope.cancelled_caught
        nursery.start_soon(reader.open_image, info, file_of(info, NAME))
        await wait_all_tasks_blocked()
        gate.set()


@in_trio
async def test_a_manifest_is_kept_for_the_given_age() -> None:
    source, info = stored()
    info = listed_by_a_server(info)
    async with open_reader(source) as reader:
        image = await reader.open_image(info, file_of(info, NAME), 5)
        await trio.sleep(4.9)
        assert await reader.open_image(info, file_of(info, NAME), 5) is image
        assert source.calls["fetch_file"] == 2  # manifest and index
        await trio.sleep(0.1)
        assert await reader.open_image(info, file_of(info, NAME), 5) is image
        assert source.calls["fetch_file"] == 3  # the manifest, and it is the same
        assert await reader.open_image(info, file_of(info, NAME)) is image
        assert source.calls["fetch_file"] == 3


@pytest.mark.parametrize("age", [0.0, 1.0, 5.0])
@in_trio
async def test_a_snapshot_that_was_made_again_with_the_same_sizes_opens_with_its_new_content(
    age: float,
) -> None:
    source, info = stored()
    info = listed_by_a_server(info)
    size, text = len(CONTENT), (b"cores: 2\n" * 50).swapcase()
    async with open_reader(source) as reader:
        old = await reader.open_image(info, file_of(info, NAME), 5)
        assert await reader.read_blob(info, file_of(info, CONF), 5) == text.swapcase()
        contents = {NAME: random.Random(5).randbytes(size), CONF: text}
        again = listed_by_a_server(source.add(SNAPSHOT, contents))
        assert all(file_of(again, name) == file_of(info, name) for name in contents)
        await trio.sleep(age)
        assert await reader.read_blob(info, file_of(info, CONF), 5) == text
        new = await reader.open_image(info, file_of(info, NAME), 5)
        assert await new.read(0, size) == contents[NAME]
        assert await old.read(0, size) == CONTENT  # what is open goes on


@in_trio
async def test_an_index_that_is_damaged_is_compared_with_the_present_manifest_before_it_is_called_so() -> (
    None
):
    source, info = stored()
    raw = source.files[SNAPSHOT, Archive(NAME)]
    source.files[SNAPSHOT, Archive(NAME)] = raw[:-1] + bytes([raw[-1] ^ 1])
    info = listed_by_a_server(info)
    async with open_reader(source) as reader:
        with pytest.raises(DamageError, match="checksum"):
            await reader.open_image(info, file_of(info, NAME))
        assert source.calls["fetch_file"] == 3  # the manifest twice, and the index


@in_trio
async def test_open_images_are_shared_and_their_index_is_fetched_once() -> None:
    source, info = stored()
    async with open_reader(source) as reader:
        first = await reader.open_image(info, file_of(info, NAME))
        assert await reader.open_image(info, file_of(info, NAME)) is first
        assert source.calls["fetch_file"] == 1


@in_trio
async def test_two_who_open_an_image_at_once_get_the_same() -> None:
    source, info = stored()
    gate = source.hold("fetch_file")
    images = []

    async def open_it(reader: Reader) -> None:
        images.append(await reader.open_image(info, file_of(info, NAME)))

    async with open_reader(source) as reader, trio.open_nursery() as nursery:
        nursery.start_soon(open_it, reader)
        nursery.start_soon(open_it, reader)
        await wait_all_tasks_blocked()
        gate.set()
    assert images[0] is images[1]


@in_trio
async def test_an_image_that_nobody_holds_any_more_is_let_go() -> None:
    source, info = stored()
    async with open_reader(source) as reader:
        image = await reader.open_image(info, file_of(info, NAME))
        assert len(reader._opened._images) == 1
        del image
        gc.collect()
        assert len(reader._opened._images) == 0
        await reader.open_image(info, file_of(info, NAME))
    assert source.calls["fetch_file"] == 2


@in_trio
async def test_a_snapshot_that_was_replaced_by_another_is_not_mistaken_for_it() -> None:
    source, info = stored()
    async with open_reader(source) as reader:
        old = await reader.open_image(info, file_of(info, NAME))
        other = made.image(2, "rr")
        changed = source.add(SNAPSHOT, {NAME: other})
        new = await reader.open_image(changed, file_of(changed, NAME))
        assert await new.read(0, len(other)) == other
        assert old.size == len(CONTENT)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"size": len(CONTENT) + 1}, f"holds {len(CONTENT)} bytes, the manifest says {len(CONTENT) + 1}"),
        ({"size": 0}, "the manifest says 0"),
        ({"csum": bytes(32)}, "checksum differs from the manifest"),
    ],
)
@in_trio
async def test_an_index_that_differs_from_the_manifest_is_refused(
    change: dict[str, object], text: str
) -> None:
    source, info = stored()
    file = replace(file_of(info, NAME), **change)  # type: ignore[arg-type]
    source.set_manifest(SNAPSHOT, [file], None)
    async with open_reader(source) as reader:
        with pytest.raises(DamageError, match=text) as caught:
            await reader.open_image(info, file)
        assert f"{SNAPSHOT}/{NAME}" in str(caught.value)
        assert (await reader.open_image(info, file_of(info, NAME))).size == len(CONTENT)


@in_trio
async def test_every_bit_of_an_index_that_flips_is_noticed() -> None:
    source, info = stored()
    archive = Archive(NAME)
    whole = source.files[SNAPSHOT, archive]
    header = [*range(8), *range(24 + 8, 24 + 8 + 32 + 16)]  # uuid and ctime tell the reader nothing
    places = [*header, *range(index.HEADER_SIZE, len(whole), 5)]
    async with open_reader(source) as reader:
        for place in places:
            for bit in (1, 128):
                raw = bytearray(whole)
                raw[place] ^= bit
                source.files[SNAPSHOT, archive] = bytes(raw)
                with pytest.raises(DamageError):
                    await reader.open_image(info, file_of(info, NAME))


@in_trio
async def test_a_file_that_is_listed_but_missing_is_damage() -> None:
    source, info = stored()
    del source.files[SNAPSHOT, Archive(NAME)], source.files[SNAPSHOT, Archive(CONF)]
    async with open_reader(source) as reader:
        with pytest.raises(DamageError, match="listed in the snapshot, but missing"):
            await reader.open_image(info, file_of(info, NAME))
        with pytest.raises(DamageError, match="listed in the snapshot, but missing"):
            await reader.read_blob(info, file_of(info, CONF))


@in_trio
async def test_a_source_that_fails_while_opening_is_asked_again() -> None:
    source, info = stored()
    source.fail("fetch_file", SourceError("no answer"))
    async with open_reader(source) as reader:
        with pytest.raises(SourceError, match="no answer"):
            await reader.open_image(info, file_of(info, NAME))
        assert (await reader.open_image(info, file_of(info, NAME))).size == len(CONTENT)


@in_trio
async def test_without_the_key_only_what_is_encrypted_is_out_of_reach() -> None:
    source, info = stored(CryptMode.ENCRYPT)
    async with open_reader(source) as reader:
        for name in (NAME, CONF):
            file = file_of(info, name)
            reading = reader.open_image(info, file) if name == NAME else reader.read_blob(info, file)
            with pytest.raises(KeyRequiredError) as caught:
                await reading
            assert made.KEY.fingerprint in str(caught.value)
            assert f"{SNAPSHOT}/{file.archive.name}" in str(caught.value)
        assert source.calls["fetch_file"] == 0  # known without asking
        assert Manifest.parse(await reader.read_blob(info, file_of(info, MANIFEST.filename))).files
        with pytest.raises(KeyRequiredError, match=r"client\.log is encrypted with the key 0e:ab"):
            await reader.read_blob(info, file_of(info, CLIENT_LOG.filename))


# --- blobs


@pytest.mark.parametrize("mode", list(CryptMode))
@in_trio
async def test_blobs_are_decoded(mode: CryptMode) -> None:
    source, info = stored(mode)
    async with open_reader(source, keys=KEYS) as reader:
        assert await reader.read_blob(info, file_of(info, CONF)) == b"cores: 2\n" * 50
        assert await reader.read_blob(info, file_of(info, "tiny.blob")) == b"x"
        assert await reader.read_blob(info, file_of(info, CLIENT_LOG.filename)) == b"all is well\n" * 9
        assert await reader.blob_size(info, file_of(info, CONF)) == 450


@in_trio
async def test_without_the_key_a_blob_has_the_size_that_can_be_told() -> None:
    source, info = stored(CryptMode.ENCRYPT)
    compressed, plain = file_of(info, CONF), file_of(info, "tiny.blob")
    async with open_reader(source) as reader:
        assert await reader.blob_size(info, compressed) == compressed.size
        assert await reader.blob_size(info, plain) == 1


@in_trio
async def test_every_bit_of_a_blob_that_flips_is_noticed() -> None:
    source, info = stored()
    archive = Archive(CONF)
    whole = source.files[SNAPSHOT, archive]
    async with open_reader(source) as reader:
        for place in range(len(whole)):
            raw = bytearray(whole)
            raw[place] ^= 1 << place % 8
            source.files[SNAPSHOT, archive] = bytes(raw)
            with pytest.raises(DamageError, match=f"{SNAPSHOT}/qemu-server.conf: checksum differs"):
                await reader.read_blob(info, file_of(info, CONF))


@pytest.mark.parametrize("change", [b"", b"more"])
@in_trio
async def test_a_blob_of_another_length_than_the_manifest_says_is_damage(change: bytes) -> None:
    source, info = stored()
    archive = Archive(CONF)
    source.files[SNAPSHOT, archive] = (source.files[SNAPSHOT, archive] + change) if change else b""
    async with open_reader(source) as reader:
        with pytest.raises(DamageError, match="the manifest says"):
            await reader.read_blob(info, file_of(info, CONF))


def with_blob(archive: Archive, raw: bytes, mode: CryptMode | None) -> tuple[MemorySource, SnapshotInfo]:
    source = MemorySource()
    source.files[SNAPSHOT, archive] = raw
    csum = None if mode is None else hashlib.sha256(raw).digest()
    file = FileInfo(archive, len(raw), mode, csum)
    source.set_manifest(SNAPSHOT, [file], made.KEY)
    return source, SnapshotInfo(SNAPSHOT, (file,), key_fingerprint=made.KEY.fingerprint)


@pytest.mark.parametrize(
    ("mode", "encrypted", "text"),
    [
        (CryptMode.ENCRYPT, False, "the blob is not encrypted"),
        (CryptMode.NONE, True, "the blob is encrypted"),
        (CryptMode.SIGN_ONLY, True, "the blob is encrypted"),
    ],
)
@in_trio
async def test_a_blob_of_another_kind_than_the_manifest_says_is_damage(
    mode: CryptMode, encrypted: bool, text: str
) -> None:
    raw = blob.encode(b"data", key=made.KEY if encrypted else None)
    source, info = with_blob(Archive(CONF), raw, mode)
    async with open_reader(source, keys=KEYS) as reader:
        with pytest.raises(DamageError, match=text):
            await reader.read_blob(info, info.files[0])


@in_trio
async def test_the_backup_s_key_is_a_plain_blob_though_the_manifest_says_encrypt() -> None:
    source, info = with_blob(MASTER_KEY_BLOB, blob.encode(b"sealed by RSA"), CryptMode.ENCRYPT)
    async with open_reader(source) as reader:  # needs no key: it is what one gets the key from
        assert await reader.read_blob(info, info.files[0]) == b"sealed by RSA"
    source, info = with_blob(MASTER_KEY_BLOB, blob.encode(b"?", key=made.KEY), CryptMode.ENCRYPT)
    async with open_reader(source, keys=KEYS) as reader:
        with pytest.raises(DamageError, match="the blob is encrypted"):
            await reader.read_blob(info, info.files[0])


@pytest.mark.parametrize("encrypted", [True, False])
@in_trio
async def test_the_client_s_log_may_be_encrypted_or_not(encrypted: bool) -> None:
    raw = blob.encode(b"log\n", key=made.KEY if encrypted else None)
    source, info = with_blob(CLIENT_LOG, raw, None)
    async with open_reader(source, keys=KEYS) as reader:
        assert await reader.read_blob(info, info.files[0]) == b"log\n"
        damaged = bytearray(raw)
        damaged[-1] ^= 1
        source.files[SNAPSHOT, CLIENT_LOG] = bytes(damaged)
        with pytest.raises(DamageError, match="CRC mismatch"):
            await reader.read_blob(info, info.files[0])


# --- the end


@in_trio
async def test_what_the_body_raises_comes_out_as_it_is_and_the_source_is_closed() -> None:
    for error in (DamageError("wrong"), ValueError("other"), trio.ClosedResourceError()):
        source, _info = stored()
        with pytest.raises(type(error)) as caught:
            async with open_reader(source):
                raise error
        assert caught.value is error
        assert source.closed == 1


@in_trio
async def test_a_source_that_cannot_be_opened_is_closed_and_says_why() -> None:
    class Shut(MemorySource):
        async def open(self, nursery: trio.Nursery) -> None:
            nursery.start_soon(trio.sleep_forever)
            raise error

    error, source = SourceError("wrong password"), Shut()
    with pytest.raises(SourceError) as caught:
        async with open_reader(source):
            pytest.fail("was opened")
    assert caught.value is error
    assert source.closed == 1


@in_trio
async def test_the_source_is_closed_when_the_body_ends_or_is_cancelled() -> None:
    source, _info = stored()
    async with open_reader(source):
        assert source.closed == 0
    assert source.closed == 1
    with trio.move_on_after(5) as scope:
        async with open_reader(source):
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert source.closed == 2


@in_trio
async def test_leaving_ends_what_is_still_being_fetched() -> None:
    source, info = stored()
    source.hold("fetch_chunk")
    async with open_reader(source) as reader:
        image = await reader.open_image(info, file_of(info, NAME))
        image.store.request(image.chunk(0))
        await wait_all_tasks_blocked()
        assert source.in_flight == 1
    assert source.in_flight == 0
    assert source.closed == 1


# --- the whole way, from files on disk


@pytest.mark.golden
@pytest.mark.parametrize("encrypted", [True, False])
def test_what_the_vendor_s_client_wrote_reads_back_as_it_was(encrypted: bool) -> None:
    key = golden.plain_key()
    read = 0

    async def main() -> None:
        nonlocal read
        source = DirectorySource(golden.DATASTORE)
        async with open_reader(source, keys={key.fingerprint: key}) as reader:
            for group in await source.groups(ROOT_NAMESPACE):
                for info in await source.snapshots(group.group):
                    for file in info.files:
                        read += await check(reader, info, file)

    async def check(reader: Reader, info: SnapshotInfo, file: FileInfo) -> bool:
        path = f"{info.snapshot}/{file.archive.name}"
        original = originals.get(path)
        if original is None:
            return False
        if file.archive.filename.endswith(".blob"):
            data = await reader.read_blob(info, file)
            assert (len(data), hashlib.sha256(data).hexdigest()) == (original.size, original.sha256), path
            return True
        image = await reader.open_image(info, file)
        handle = image.handle()
        state = hashlib.sha256()
        for offset in range(0, image.size, 4 << 20):
            state.update(await handle.read(offset, 4 << 20))
        handle.close()
        assert (image.size, state.hexdigest()) == (original.size, original.sha256), path
        return True

    # Those of 1 GiB, which are nearly all holes, are left to the tests of the command line.
    originals = {
        original.path: original
        for original in golden.originals()
        if original.key in (None, "plain")
        and original.encrypted == encrypted
        and original.size <= 64 << 20
        and not original.path.startswith("ns/")
    }
    trio.run(main)  # on a true clock: the source sets limits to work in threads
    assert read == len(originals) > 2


def test_what_was_written_to_disk_reads_back(writer: DatastoreWriter) -> None:
    writer.add_snapshot(
        SNAPSHOT,
        {NAME: CONTENT, CONF: b"cores: 2\n"},
        crypt_mode=CryptMode.ENCRYPT,
        key=made.KEY,
        chunk_size=CHUNK_SIZE,
    )

    async def main() -> None:
        source = DirectorySource(writer.path)
        async with open_reader(source, keys=KEYS) as reader:
            (info,) = await source.snapshots(SNAPSHOT.group)
            image = await reader.open_image(info, file_of(info, NAME))
            assert await image.read(0, 1 << 20) == CONTENT
            assert await reader.read_blob(info, file_of(info, CONF)) == b"cores: 2\n"

    trio.run(main)  # on a true clock: the source sets limits to work in threads


@in_trio
async def test_manifests_are_charged_and_dropped_before_anything_is_refused() -> None:
    source = MemorySource()
    infos = [source.add(made.snapshot(time=made.TIME + day), {CONF: b"x"}, key=made.KEY) for day in range(3)]
    async with open_reader(source, keys=KEYS) as reader:
        memory = reader.store.memory
        for info in infos:
            await reader.version(info.snapshot, math.inf)
        charged = memory.charged("manifests")
        asked = source.calls["fetch_file"]
        await reader.version(infos[0].snapshot, math.inf)
        assert (source.calls["fetch_file"], charged % 3) == (asked, 0)
        big = memory.charge("open files", charged // 3 - memory.excess())
        memory.reclaim()
        assert memory.charged("manifests") == charged // 3 * 2
        await reader.version(infos[0].snapshot, math.inf)  # used last, so still there
        assert source.calls["fetch_file"] == asked
        await reader.version(infos[1].snapshot, math.inf)
        assert source.calls["fetch_file"] == asked + 1
        del big
