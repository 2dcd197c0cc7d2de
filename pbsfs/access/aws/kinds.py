"""The kinds of places that give a key, by name: to hand one over to another process.

Used by `pbsfs.access.description`. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping

from pbsfs.access.aws.ask import Route
from pbsfs.access.aws.keys import CommandKey, Facts, GivenKey, KeySource, NoKey
from pbsfs.access.aws.services import ContainerKey, InstanceKey
from pbsfs.access.aws.sso import LoginKey
from pbsfs.access.aws.sts import RoleKey, WebIdentityKey

KINDS: Mapping[str, type[KeySource]] = {
    kind.kind: kind
    for kind in (NoKey, GivenKey, CommandKey, WebIdentityKey, RoleKey, LoginKey, ContainerKey, InstanceKey)
}


def dump_key(source: KeySource) -> Facts:
    """All of it, secrets included."""
    facts = source.dump()
    if isinstance(source, RoleKey):
        facts["source"] = dump_key(source.source)
    return {"kind": source.kind, "facts": facts}


def load_key(facts: Facts) -> KeySource:
    """The inverse of `dump_key`."""
    kind, inside = KINDS[facts["kind"]], dict(facts["facts"])
    if "source" in inside:
        inside["source"] = load_key(inside["source"])
    if "route" in inside:
        inside["route"] = Route(**inside["route"])
    return kind.load(inside)
