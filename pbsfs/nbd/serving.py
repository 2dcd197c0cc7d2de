"""nbdkit serving a source, from when clients can connect: what the commands that need NBD share.

Synchronous. The caller has checked that the path can be exported, so that errors reach users before nbdkit
starts.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from pbsfs.access.description import Description
from pbsfs.nbd import launch
from pbsfs.nbd.launch import Address
from pbsfs.runtime.memory import DEFAULT_CACHE_SIZE
from pbsfs.tasks.metrics import MetricsAddress


@contextmanager
def serving(
    nbdkit: str,
    path: str,
    address: Address,
    options: Sequence[str],
    description: Description,
    *,
    cache_size: int = DEFAULT_CACHE_SIZE,
    zeros_for_damage: bool = False,
    log_format: str | None = None,
    metrics: MetricsAddress | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """An nbdkit process that serves `path` of the source; it is stopped at the end.

    `nbdkit`: its path. `path`: in the tree, without links. `options`: for nbdkit, with parameters of filters.
    `cache_size`: bytes. `log_format`: None for that of the environment. `metrics`: see
    `Settings`. Raises HelperError.
    """
    parameters = [f"path={path}", f"cache_size={cache_size}"]
    parameters += ["on_damage=zero"] if zeros_for_damage else []
    parameters += [f"log_format={log_format}"] if log_format is not None else []
    parameters += [f"metrics={metrics}"] if metrics is not None else []
    with description.handed_over() as described, ExitStack() as stack:
        reading, writing = os.pipe()
        stack.callback(os.close, reading)
        parameters += [f"source_fd={described}", f"ready_fd={writing}"]
        arguments = launch.command_line(nbdkit, address, options, parameters)
        try:
            child = stack.enter_context(launch.running(arguments, [described, writing, *address.descriptors]))
        finally:
            os.close(writing)
        launch.wait_until_ready(child, reading)
        yield child
