"""The kinds of places that give a key, by name: to hand one over to another process.

Used by `pbsfs.access.description`. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping

from pbsfs.access.aws.keys import CommandKey, Facts, GivenKey, KeySource, NoKey
from pbsfs.access.aws.services import ContainerKey, InstanceKey
from pbsfs.access.aws.sts import WebIdentityKey

KINDS: Mapping[str, type[KeySource]] = {
    kind.kind: kind for kind in (NoKey, GivenKey, CommandKey, WebIdentityKey, ContainerKey, InstanceKey)
}


def dump_key(source: KeySource) -> Facts:
    """All of it, secrets included."""
    return {"kind": source.kind, "facts": source.dump()}


def load_key(facts: Facts) -> KeySource:
    """The inverse of `dump_key`."""
    return KINDS[facts["kind"]].load(facts["facts"])
