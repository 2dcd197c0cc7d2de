"""A model of a reader without a pipeline: one chunk at a time is fetched and decoded, in the caller's thread.

That is how the C plugin for nbdkit reads, and it stands in for it where that is not installed. It is made of
pbsfs's own parts, so what it lacks is the pipeline only. It is generous: holes are known from the index, and
are not fetched.

    PBS_REPOSITORY=… python -m bench.model SNAPSHOT      reads an image from start to end, into nothing
    PBS_REPOSITORY=… nbdkit python bench/model_plugin.py path=SNAPSHOT/IMAGE
"""

from __future__ import annotations

import os
import sys
from collections import OrderedDict
from collections.abc import Mapping

from bench.bare import BareSession
from bench.data import INDEX, KEY, PLAIN
from bench.serving import Access
from pbsfs.base.names import ROOT_NAMESPACE, Group, Snapshot, parse_time
from pbsfs.formats.keys import Key
from pbsfs.sources.server.repository import Repository

KEPT = 16
"""Decoded chunks that are kept."""


def access_from(environment: Mapping[str, str]) -> Access:
    repository = Repository.parse(environment["PBS_REPOSITORY"])
    auth_id = repository.user + (f"!{repository.token}" if repository.token else "")
    secret, fingerprint = environment["PBS_PASSWORD"], environment["PBS_FINGERPRINT"]
    return Access(repository.port, fingerprint, auth_id, secret, repository.store)


class Model:
    """An image. One thread."""

    def __init__(self, access: Access, snapshot: Snapshot, key: Key | None) -> None:
        self._session = BareSession(access, snapshot)
        self._index = self._session.index(INDEX, key)
        self._key = key
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self.size = self._index.size

    def read_into(self, buffer: memoryview, offset: int) -> None:
        done = 0
        while done < len(buffer):
            number = self._index.find(offset + done)
            start, end = self._index.span(number)
            length = min(end - offset - done, len(buffer) - done)
            at = offset + done - start
            if self._index.is_hole(number):
                buffer[done : done + length] = bytes(length)
            else:
                buffer[done : done + length] = self._chunk(number)[at : at + length]
            done += length

    def _chunk(self, number: int) -> memoryview:
        content = self._kept.get(number)
        if content is None:
            content = self._kept[number] = self._session.decoded(self._index, number, self._key)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(number)
        return memoryview(content)

    def read_all(self) -> None:
        """Every chunk that is no hole, in order."""
        for number in range(self._index.count):
            if not self._index.is_hole(number):
                self._session.decoded(self._index, number, self._key)


def open_model(snapshot: str) -> Model:
    """The image of `snapshot` on the server that the environment names."""
    kind, backup_id, time = snapshot.split("/")
    parsed = Group(ROOT_NAMESPACE, kind, backup_id).snapshot(parse_time(time))
    return Model(access_from(os.environ), parsed, None if parsed.group == PLAIN.group else KEY)


if __name__ == "__main__":
    open_model(sys.argv[1]).read_all()
