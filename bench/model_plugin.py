"""nbdkit plugin, in Python: the model (see model.py) as a network block device."""

from __future__ import annotations

import os
import site
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.model import Model

API_VERSION = 2

_checkout = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
_before = list(sys.path)
site.addsitedir(f"{_checkout}/.venv/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages")
sys.path[:] = [_checkout, *sys.path[len(_before) :], *_before]

_paths: list[str] = []


def config(key: str, value: str) -> None:
    if key == "path":
        _paths.append(value)


def open(readonly: bool) -> Model:  # noqa: A001 - nbdkit's name for it
    from bench.model import open_model  # noqa: PLC0415 - after the fork

    return open_model(_paths[0].rpartition("/")[0])


def get_size(model: Model) -> int:
    return model.size


def pread(model: Model, buffer: memoryview, offset: int, flags: int) -> None:
    model.read_into(buffer, offset)
