"""The others, where they are installed: the vendor's client and library, and the C plugin for nbdkit."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from bench.data import CHUNK, IMAGE, INDEX, Data
from bench.limits import key_of
from bench.measures import BenchError, Sample, command, run
from bench.program import Nbd, Pbsfs
from bench.serving import RunningServer
from pbsfs.base.names import ROOT_NAMESPACE, Snapshot


def client_restore(
    client: Path, pbsfs: Pbsfs, server: RunningServer, data: Data, snapshot: Snapshot, dest: Path | str
) -> Sample:
    words: list[str | Path] = [client, "restore", str(snapshot), IMAGE, dest]
    words += ["--keyfile", data.keyfile] if key_of(snapshot) is not None else []
    return command(words, size=data.data_bytes, environment=pbsfs.environment(server), server=server.pid)


@contextmanager
def client_map(client: Path, pbsfs: Pbsfs, server: RunningServer, snapshot: Snapshot) -> Iterator[Path]:
    """The loop device that the vendor's client maps an image to."""
    environment = pbsfs.environment(server)
    output = run([client, "map", str(snapshot), IMAGE], environment=environment, keep_output=True).output
    found = re.search(rb"/dev/loop[0-9]+", output)
    if found is None:
        raise BenchError(f"{client} map does not say where: {output.decode(errors='replace')}")
    device = Path(found[0].decode())
    try:
        yield device
    finally:
        run([client, "unmap", device], environment=environment)


def c_plugin(
    plugin: Path, pbsfs: Pbsfs, server: RunningServer, snapshot: Snapshot
) -> AbstractContextManager[Nbd]:
    access = server.with_password
    words = [str(plugin), f"image={IMAGE}", f"vmid={snapshot.group.id}", f"timestamp={snapshot.time_text}"]
    words += [f"repo={access.repository}", f"password={access.secret}", f"fingerprint={access.fingerprint}"]
    return pbsfs.nbdkit([*words, "namespace="], pbsfs.environment(server), server.pid)


def library_restore(
    library: Path, pbsfs: Pbsfs, server: RunningServer, data: Data, snapshot: Snapshot, threads: int
) -> Sample:
    """A whole image by the vendor's library, read by so many threads side by side."""
    words = [sys.executable, "-m", "bench.peers", str(library), str(snapshot), str(threads)]
    words += [str(data.keyfile)] if key_of(snapshot) is not None else []
    environment = pbsfs.environment(server.with_password)
    environment |= {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    return command(words, size=data.data_bytes, environment=environment, server=server.pid)


def _read_with_library(library: str, snapshot: str, threads: int, keyfile: str | None) -> None:
    loaded = ctypes.CDLL(library)
    loaded.proxmox_restore_new_ns.restype = ctypes.c_void_p
    loaded.proxmox_restore_get_image_length.restype = ctypes.c_long
    error = ctypes.c_char_p()

    def check(failed: bool) -> None:
        if failed:
            raise BenchError(f"the library: {(error.value or b'').decode(errors='replace')}")

    def text(value: str | None) -> bytes | None:
        return None if value is None else value.encode()

    handle = loaded.proxmox_restore_new_ns(
        text(os.environ["PBS_REPOSITORY"]),
        text(snapshot),
        text(str(ROOT_NAMESPACE)),
        text(os.environ["PBS_PASSWORD"]),
        text(keyfile),
        None,
        text(os.environ["PBS_FINGERPRINT"]),
        ctypes.byref(error),
    )
    check(not handle)
    pointer = ctypes.c_void_p(handle)
    check(loaded.proxmox_restore_connect(pointer, ctypes.byref(error)) < 0)
    image = loaded.proxmox_restore_open_image(pointer, text(INDEX), ctypes.byref(error))
    check(image < 0)
    size = loaded.proxmox_restore_get_image_length(pointer, ctypes.c_uint8(image), ctypes.byref(error))
    check(size < 0)
    places = iter(range(0, size, CHUNK))
    guard = threading.Lock()
    failures: list[str] = []

    def read() -> None:
        buffer = ctypes.create_string_buffer(CHUNK)
        while True:
            with guard:
                offset = next(places, None)
            if offset is None:
                return
            told = ctypes.c_char_p()
            length = min(CHUNK, size - offset)
            done = loaded.proxmox_restore_read_image_at(
                pointer,
                ctypes.c_uint8(image),
                buffer,
                ctypes.c_uint64(offset),
                ctypes.c_uint64(length),
                ctypes.byref(told),
            )
            if done < 0:
                failures.append((told.value or b"").decode(errors="replace"))
                return

    workers = [threading.Thread(target=read) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    loaded.proxmox_restore_disconnect(pointer)
    if failures:
        raise BenchError(f"the library: {failures[0]}")


if __name__ == "__main__":
    _read_with_library(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] if len(sys.argv) > 4 else None)
