"""Small random reads, counted: by fio where it is installed, or else by small loops in Python."""

from __future__ import annotations

import json
import mmap
import os
import random
import shutil
import socket
import struct
import time
from dataclasses import dataclass
from pathlib import Path

from bench.measures import Sample, Watched, run

BLOCK = 4096


@dataclass(frozen=True, slots=True)
class Region:
    """Where to read, in bytes."""

    offset: int
    length: int


def fio_knows(engine: str) -> bool:
    if shutil.which("fio") is None:
        return False
    return engine in run(["fio", "--enghelp"], keep_output=True).output.decode().split()


def random_file_reads(
    path: Path, region: Region, seconds: float, watched: Watched, *, direct: bool
) -> Sample:
    """One at a time. `direct`: past the kernel's page cache."""
    if not fio_knows("psync"):
        return _python_file_reads(path, region, seconds, watched, direct=direct)
    words = [
        "--ioengine=psync",
        "--filename=" + str(path).replace(":", "\\:"),
        f"--direct={int(direct)}",
        "--invalidate=0",
    ]
    return _fio(words, region, seconds, watched)


def random_nbd_reads(uri: str, region: Region, seconds: float, watched: Watched, *, depth: int) -> Sample:
    """`depth`: how many are under way at once."""
    if not fio_knows("nbd"):
        return _python_nbd_reads(uri, region, seconds, watched)
    return _fio(["--ioengine=nbd", f"--uri={uri}", f"--iodepth={depth}"], region, seconds, watched)


def _fio(words: list[str], region: Region, seconds: float, watched: Watched) -> Sample:
    common = [
        "fio",
        "--name=reads",
        "--readonly",
        "--rw=randread",
        f"--bs={BLOCK}",
        "--time_based",
        "--thread",
    ]
    common += [f"--runtime={seconds:.0f}", f"--offset={region.offset}", f"--size={region.length}"]
    common += ["--output-format=json", "--randrepeat=1", "--norandommap"]
    outputs: list[bytes] = []
    sample = watched.measure(lambda: outputs.append(run([*common, *words], keep_output=True).output))
    text = outputs[0].decode()
    told = json.loads(text[text.index("{") :])["jobs"][0]["read"]
    return Sample(
        seconds=told["runtime"] / 1000,
        operations=told["total_ios"],
        cpu=sample.cpu,
        server_cpu=sample.server_cpu,
        peak=sample.peak,
        counts={"p99 ms": told["clat_ns"].get("percentile", {}).get("99.000000", 0) / 1e6},
    )


def _places(region: Region) -> list[int]:
    source = random.Random(3)
    return [region.offset + source.randrange(region.length // BLOCK) * BLOCK for _ in range(4096)]


def _python_file_reads(
    path: Path, region: Region, seconds: float, watched: Watched, *, direct: bool
) -> Sample:
    fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    count = 0

    def work() -> None:
        nonlocal count
        with mmap.mmap(-1, BLOCK) as page:
            deadline = time.perf_counter() + seconds
            while time.perf_counter() < deadline:
                for place in places:
                    os.preadv(fd, [page], place)
                count += len(places)

    places = _places(region)
    try:
        sample = watched.measure(work)
    finally:
        os.close(fd)
    return Sample(
        sample.seconds, operations=count, cpu=sample.cpu, server_cpu=sample.server_cpu, peak=sample.peak
    )


def _python_nbd_reads(uri: str, region: Region, seconds: float, watched: Watched) -> Sample:
    count = 0
    client = NbdClient(Path(uri.partition("socket=")[2]))

    def work() -> None:
        nonlocal count
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline:
            for place in places:
                client.read(place, BLOCK)
            count += len(places)

    places = _places(region)
    try:
        sample = watched.measure(work)
    finally:
        client.close()
    return Sample(
        sample.seconds, operations=count, cpu=sample.cpu, server_cpu=sample.server_cpu, peak=sample.peak
    )


class NbdClient:
    """The least of the NBD protocol: one connection to the default export, one read at a time."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._receive(18)
        self._socket.sendall(struct.pack(">I", 3))  # fixed newstyle, no zeros behind the export's data
        self._socket.sendall(b"IHAVEOPT" + struct.pack(">II", 1, 0))  # NBD_OPT_EXPORT_NAME: ""
        self.size: int = struct.unpack(">QH", self._receive(10))[0]

    def _receive(self, size: int) -> bytes:
        data = self._socket.recv(size, socket.MSG_WAITALL)
        if len(data) != size:
            raise ConnectionError("nbdkit closed the connection")
        return data

    def read(self, offset: int, size: int) -> bytes:
        self._socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, offset, size))
        _magic, error, _handle = struct.unpack(">IIQ", self._receive(16))
        if error:
            raise OSError(error, "an NBD read failed")
        return self._receive(size)

    def close(self) -> None:
        self._socket.close()
