"""A run of the machine: QEMU, and what the guest reports.

The guest writes a line an event to its second serial port: `begin NAME`, `pass NAME`, `fail NAME`, `| TEXT`
(what the check printed), and `reboot NAME` or `poweroff NAME` before it goes down, whose end is QEMU's.
Synchronous; the deadline of the whole run is a timer that ends QEMU.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.machine.base import Base, MachineError

SHUTDOWN_LIMIT = 150.0
"""Seconds that the machine may take from the order to go down to its end, emulated: systemd gives a service
90 seconds."""


@dataclass(slots=True)
class Result:
    """What became of a check. `seconds`: how long it took. `lines`: what it printed."""

    name: str
    passed: bool
    seconds: float
    lines: list[str] = field(default_factory=list)


def run(base: Base, disk: Path, payload: Path, log: Path, *, memory: int, limit: float) -> Iterator[Result]:
    """Runs the machine until it powers off; yields each check's result when it is known.

    `disk`: what it writes to; made here, as an overlay of the base. `payload`: the disk with the checks.
    `log`: gets what the guest prints on its console. `memory`: in MiB. `limit`: seconds for the whole run.
    Raises MachineError if QEMU fails, or is not done within the limit.
    """
    _overlay(base.disk, disk)
    log.unlink(missing_ok=True)
    end = time.monotonic() + limit
    again = True
    while again:
        with subprocess.Popen(
            _qemu(base, disk, payload, log, memory), stdout=subprocess.PIPE, text=True, errors="replace"
        ) as qemu:
            assert qemu.stdout is not None
            late = threading.Timer(end - time.monotonic(), qemu.kill)
            late.start()
            try:
                again = yield from results(qemu.stdout, time.monotonic)
            except MachineError:
                if late.is_alive():
                    raise
                raise MachineError(f"not done within {limit:.0f} seconds; the console is in {log}") from None
            finally:
                late.cancel()
                qemu.kill()


def results(lines: Iterable[str], clock: Callable[[], float]) -> Generator[Result, None, bool]:
    """The results in what a guest reports until it goes down; returns whether it is to boot again.

    `clock`: seconds. Raises MachineError if the lines end before the guest went down.
    """
    printed: list[str] = []
    event, name = "", ""
    started = clock()
    for line in lines:
        event, _, text = line.rstrip("\r\n").partition(" ")
        if event == "|":
            printed.append(text)
        elif event in ("pass", "fail"):
            yield Result(text, event == "pass", clock() - started, printed)
            printed = []
        elif event in ("begin", "reboot", "poweroff"):
            name, started = text, clock()
    if event not in ("reboot", "poweroff"):
        raise MachineError(f"the machine ended before its checks did; the last one was {name or 'its start'}")
    seconds = clock() - started
    yield Result(name, seconds < SHUTDOWN_LIMIT, seconds, printed)
    return event == "reboot"


def _overlay(base: Path, disk: Path) -> None:
    command: list[str | Path] = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, disk]
    subprocess.run(command, check=True)


def _qemu(base: Base, disk: Path, payload: Path, log: Path, memory: int) -> list[str]:
    devices = {
        "drive": [
            f"file={disk},format=qcow2,if=virtio,cache=unsafe",
            f"file={payload},format=raw,if=virtio,readonly=on",
        ],
        "netdev": ["user,id=net"],
        "object": ["rng-random,id=rng,filename=/dev/urandom"],
        "device": ["virtio-net-pci,netdev=net,romfile=", "virtio-rng-pci,rng=rng"],
        "chardev": [f"file,id=console,path={log},append=on"],
        "serial": ["chardev:console", "stdio"],
    }
    return [
        # Killed with the process that started it, however that ends.
        *("setpriv", "--pdeathsig", "KILL"),
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", str(memory)),
        *("-kernel", str(base.kernel), "-initrd", str(base.initrd)),
        *("-append", "root=LABEL=root console=ttyS0 quiet systemd.show_status=1"),
        *(word for kind, values in devices.items() for value in values for word in (f"-{kind}", value)),
    ]
