"""The bucket source on a real S3 server: the same answers as from a directory, whatever happens to it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import trio

from pbsfs.base.errors import ConnectError, DamageError, NotFoundError, SourceError
from pbsfs.base.names import MANIFEST, ROOT_NAMESPACE, Group, Namespace
from pbsfs.formats.manifest import CryptMode
from pbsfs.reader.reader import open_reader
from pbsfs.runtime.stats import COUNTS
from pbsfs.sources.base import GroupInfo, SnapshotInfo, Source
from pbsfs.sources.directory.source import DirectorySource
from pbsfs.testing.writer import DatastoreWriter
from tests.sources.bucket.serving import LIMIT, opened, source_of
from tests.sources.conformance import CONFIG, FIRST, IMAGE, VM, add, chunks_of
from tests.sources.server.serving import until
from tests.support import golden, made
from tests.support.made import KEY, TIME
from tests.support.s3 import STORE
from tests.support.s3.gateway import Gateway
from tests.support.server.certificate import Certificate

BUCKET = golden.ROOT / "bucket" / "gbucket"
MOST = 1 << 30

Answers = tuple[list[Namespace], list[GroupInfo], dict[Group, list[SnapshotInfo]]]


async def answers_of(source: Source) -> Answers:
    """All that lists have."""
    namespaces = [ROOT_NAMESPACE]
    groups: list[GroupInfo] = []
    for namespace in namespaces:
        namespaces += await source.namespaces(namespace)  # while it is walked through
        groups += await source.groups(namespace)
    return namespaces, groups, {info.group: await source.snapshots(info.group) for info in groups}


@pytest.mark.golden
def test_a_bucket_of_a_real_server_has_the_answers_of_its_copy_in_a_directory(
    tmp_path: Path, certificate: Certificate
) -> None:
    async def main(gateway: Gateway) -> None:
        directory = DirectorySource(BUCKET)
        async with opened(source_of(gateway, certificate)) as source:
            found = await answers_of(source)
            assert found == await answers_of(directory)
            assert [str(namespace) for namespace in found[0]] == ["", "prod", "prod/void"]
            for infos in found[2].values():
                for info in infos:
                    for file in info.files:
                        fetched = await source.fetch_file(info.snapshot, file.archive, MOST)
                        assert fetched == await directory.fetch_file(info.snapshot, file.archive, MOST)

    with Gateway(tmp_path / "s3", certificate) as gateway:
        gateway.fill(BUCKET)
        trio.run(main, gateway)


@pytest.mark.golden
def test_images_in_a_bucket_of_a_real_server_are_the_originals(
    tmp_path: Path, certificate: Certificate
) -> None:
    rows = (golden.ROOT / "bucket" / "checksums.tsv").read_text().splitlines()
    sums = {path: (wanted, int(size)) for wanted, size, path, *_rest in (row.split("\t") for row in rows)}

    async def main(gateway: Gateway) -> set[str]:
        seen = set()
        async with open_reader(source_of(gateway, certificate)) as reader:
            for infos in (await answers_of(reader.source))[2].values():
                for info in infos:
                    for file in info.files:
                        path = f"{info.snapshot}/{file.archive.name}"
                        if path not in sums:
                            continue
                        image = await reader.open_image(info, file)
                        found = hashlib.sha256()
                        for offset in range(0, image.size, 16 << 20):
                            found.update(await image.read(offset, min(16 << 20, image.size - offset)))
                        assert (found.hexdigest(), image.size) == sums[path]
                        seen.add(path)
        return seen

    with Gateway(tmp_path / "s3", certificate) as gateway:
        gateway.fill(BUCKET)
        assert trio.run(main, gateway) == set(sums)


def test_what_pbsfs_writes_has_the_answers_of_its_directory(
    writer: DatastoreWriter, tmp_path: Path, certificate: Certificate
) -> None:
    for number in range(3):
        add(writer, VM.snapshot(TIME + number))
    writer.add_snapshot(
        made.snapshot("web", type="host", namespace=Namespace.parse("a/b/c")),
        {"root.pxar.didx": b"x" * 100_000, "note.conf.blob": b"text"},
        crypt_mode=CryptMode.ENCRYPT,
        key=KEY,
        notes="two\nlines é",
        protected=True,
        client_log=b"it went well",
        owner="somebody@pbs!token",
    )
    (writer.group_path(VM) / "notes").write_text("for the group\n")

    async def main(gateway: Gateway) -> None:
        async with opened(source_of(gateway, certificate)) as source:
            assert await answers_of(source) == await answers_of(DirectorySource(writer.path))
            for digest, raw in chunks_of(writer, IMAGE).items():
                assert await source.fetch_chunk(FIRST, IMAGE, digest, MOST) == raw

    with Gateway(tmp_path / "s3", certificate) as gateway:
        gateway.fill(writer.path)
        trio.run(main, gateway)


def test_a_snapshot_that_is_pruned_under_a_reader_is_an_error_of_that_read(
    writer: DatastoreWriter, tmp_path: Path, certificate: Certificate
) -> None:
    for number in range(2):
        add(writer, VM.snapshot(TIME + number))
    digests = list(chunks_of(writer, IMAGE))

    async def main(gateway: Gateway) -> None:
        async with opened(source_of(gateway, certificate)) as source:
            assert len(await source.snapshots(VM)) == 2
            base = f"{STORE}/.cnt/{FIRST}"
            names = [path.name for path in writer.snapshot_path(FIRST).iterdir()]
            gateway.delete(
                f"{base}/{name}" for name in sorted(names, key=lambda name: name != MANIFEST.filename)
            )
            gateway.delete([f"{STORE}/.chunks/{digests[0].hex()[:4]}/{digests[0].hex()}"])
            assert [info.snapshot.time for info in await source.snapshots(VM)] == [TIME + 1]
            with pytest.raises(NotFoundError, match=f"{FIRST}/{CONFIG} does not exist"):
                await source.fetch_file(FIRST, CONFIG, MOST)
            with pytest.raises(SourceError, match=f"{FIRST} was removed while it was read"):
                await source.fetch_chunk(FIRST, IMAGE, digests[0], MOST)
            with pytest.raises(DamageError, match=f"chunk {digests[0].hex()} .*: missing"):
                await source.fetch_chunk(VM.snapshot(TIME + 1), IMAGE, digests[0], MOST)
            assert await source.missing_chunks(VM.snapshot(TIME + 1), digests) == [0]
            assert await source.fetch_file(VM.snapshot(TIME + 1), CONFIG, MOST)

    with Gateway(tmp_path / "s3", certificate) as gateway:
        gateway.fill(writer.path)
        trio.run(main, gateway)


def test_a_server_that_is_stopped_and_started_again_is_waited_for(
    writer: DatastoreWriter, tmp_path: Path, certificate: Certificate, caplog: pytest.LogCaptureFixture
) -> None:
    add(writer)
    chunks = chunks_of(writer, IMAGE)

    async def main(gateway: Gateway) -> None:
        found: dict[bytes, bytes] = {}
        async with opened(source_of(gateway, certificate, retry_timeout=LIMIT)) as source:

            async def one(digest: bytes) -> None:
                found[digest] = await source.fetch_chunk(FIRST, IMAGE, digest, MOST)

            before = COUNTS.retries
            gateway.stop()
            async with trio.open_nursery() as nursery:
                for digest in chunks:
                    nursery.start_soon(one, digest)
                await until(lambda: COUNTS.retries > before)
                await trio.to_thread.run_sync(gateway.start)
            assert found == chunks
            gateway.stop()
        with pytest.raises(ConnectError, match="nothing listens there"):
            async with opened(source_of(gateway, certificate, retry_timeout=0.0)) as source:
                raise AssertionError(source)

    with Gateway(tmp_path / "s3", certificate) as gateway:
        gateway.fill(writer.path)
        trio.run(main, gateway)
    caplog.clear()


def test_a_store_that_is_missing_is_said_to_be(tmp_path: Path, certificate: Certificate) -> None:
    async def main(gateway: Gateway) -> None:
        with pytest.raises(SourceError, match="there is no datastore at s3://"):
            async with opened(source_of(gateway, certificate)) as source:
                raise AssertionError(source)

    with Gateway(tmp_path / "s3", certificate) as gateway:
        trio.run(main, gateway)


def test_without_tls_it_works_too(
    writer: DatastoreWriter, tmp_path: Path, certificate: Certificate, caplog: pytest.LogCaptureFixture
) -> None:
    add(writer)

    async def main(gateway: Gateway) -> None:
        async with opened(source_of(gateway, certificate)) as source:
            assert len(await source.snapshots(VM)) == 1

    with Gateway(tmp_path / "s3") as gateway:
        gateway.fill(writer.path)
        trio.run(main, gateway)
    (record,) = caplog.records
    assert "has no TLS" in record.getMessage()
    caplog.clear()
