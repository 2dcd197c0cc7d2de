"""The bench's server as its caller sees it: a process, and how to get at what it serves."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measures import stop
from bench.server import STORE, TOKEN, USER

CHECKOUT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Access:
    """How to get at a server's datastore."""

    port: int
    fingerprint: str
    auth_id: str
    secret: str
    store: str = STORE

    @property
    def repository(self) -> str:
        return f"{self.auth_id}@127.0.0.1:{self.port}:{self.store}"

    @property
    def authorization(self) -> str:
        return f"PBSAPIToken {self.auth_id}:{self.secret}"

    def environment(self) -> dict[str, str]:
        return {
            "PBS_REPOSITORY": self.repository,
            "PBS_PASSWORD": self.secret,
            "PBS_FINGERPRINT": self.fingerprint,
        }


@dataclass(frozen=True, slots=True)
class Counts:
    """What a server was asked for: requests for chunks, how many different ones, how often the same one at
    most, and reader sessions."""

    requests: int
    chunks: int
    most: int
    sessions: int


class RunningServer:
    """`access`: with an API token; `slow`: the same behind the simulated link; `with_password`: as a user."""

    def __init__(self, process: subprocess.Popen[str], told: dict[str, Any]) -> None:
        self._process = process
        self.access = Access(told["port"], told["fingerprint"], TOKEN, told["secret"])
        self.slow = Access(told.get("slow_port", 0), told["fingerprint"], TOKEN, told["secret"])
        self.with_password = Access(told["port"], told["fingerprint"], USER, told["password"])

    @property
    def pid(self) -> int:
        return self._process.pid

    def counts(self) -> Counts:
        """Since the last time."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("counts\n")
        self._process.stdin.flush()
        return Counts(**json.loads(self._process.stdout.readline()))


@contextmanager
def serving(
    directory: Path, *, round_trip: float = 0.0, bandwidth: float | None = None
) -> Iterator[RunningServer]:
    """A server of the datastore `directory`; it ends with this, and with this process."""
    command = [sys.executable, "-m", "bench.server", str(directory), "--round-trip", str(round_trip)]
    command += ["--bandwidth", str(bandwidth)] if bandwidth else []
    process = subprocess.Popen(
        command,
        cwd=CHECKOUT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for us
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("the server does not start")
        yield RunningServer(process, json.loads(line))
    finally:
        assert process.stdin is not None
        process.stdin.close()
        stop(process)
        assert process.stdout is not None
        process.stdout.close()
