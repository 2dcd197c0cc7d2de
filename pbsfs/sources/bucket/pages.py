"""One answer of a listing: XML to keys.

Source of the form: AWS, "ListObjectsV2". Used by `requests`. Pure, for any thread: an answer of 1000 keys
takes milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import unquote_plus

from pbsfs.base.errors import DamageError
from pbsfs.sources.bucket import xml

_MAX_SIZE = 1 << 50
"""Bytes of an object at most: real object stores have 50 TB."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object as listed. `version`: changes when its content does (ETag and time)."""

    key: str
    size: int
    version: str


@dataclass(frozen=True, slots=True)
class Page:
    """`prefixes`: of keys that go on after the delimiter, with it. `token`: for the next answer; None at the
    end."""

    objects: list[StoredObject]
    prefixes: list[str]
    token: str | None


def parse_page(body: bytes, prefix: str) -> Page:
    """Raises DamageError if it is not an answer to a listing of keys that begin with `prefix`."""
    root = xml.parse(body, "ListBucketResult")
    encoded = xml.text_of(root, "EncodingType") == "url"
    objects: list[StoredObject] = []
    prefixes: list[str] = []

    def checked(key: str) -> str:
        key = unquote_plus(key, errors="strict") if encoded else key
        if not key.startswith(prefix):
            raise DamageError("it lists keys that were not asked for")
        return key

    try:
        for element in root:
            name = xml.local_name(element)
            if name == "Contents":
                fields = {xml.local_name(child): child.text or "" for child in element}
                size = int(fields["Size"])
                if not 0 <= size <= _MAX_SIZE:
                    raise DamageError("it lists an object of an impossible size")
                version = f"{fields.get('ETag', '')} {fields.get('LastModified', '')}"
                objects.append(StoredObject(checked(fields["Key"]), size, version))
            elif name == "CommonPrefixes":
                prefixes.append(checked(xml.text_of(element, "Prefix")))
    except (KeyError, ValueError):
        raise DamageError("it lists an object without a key or size") from None
    token = xml.text_of(root, "NextContinuationToken") or None
    if xml.text_of(root, "IsTruncated") == "true":
        if token is None:
            raise DamageError("it does not say where the list goes on")
        return Page(objects, prefixes, token)
    return Page(objects, prefixes, None)
