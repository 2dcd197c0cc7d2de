"""One answer of a listing: XML to keys.

Source of the form: AWS, "ListObjectsV2". Used by `requests`. Pure, for any thread: an answer of 1000 keys
takes milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import unquote_plus

from pbsfs.base.errors import DamageError
from pbsfs.sources.bucket import xml

_MOST_DIGITS = 15
"""Digits of an object's size in bytes at most: object stores have up to 50 TB."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object as listed. `version`: changes when its content does (ETag and time)."""

    key: str
    size: int
    version: str


@dataclass(frozen=True, slots=True)
class Page:
    """`prefixes`: of keys that continue after the delimiter, with it. `token`: for the next answer; None at
    the end."""

    objects: list[StoredObject]
    prefixes: list[str]
    token: str | None


def parse_page(body: bytes, prefix: str) -> Page:
    """Raises DamageError if it is not an answer to a listing of keys that begin with `prefix`."""
    root = xml.parse(body, "ListBucketResult")
    encoded = xml.text_of(root, "EncodingType") == "url"
    objects: list[StoredObject] = []

    def checked(key: str) -> str:
        # What is not UTF-8 is not a name of a datastore, and stops nothing else.
        key = unquote_plus(key, errors="surrogateescape") if encoded else key
        if not key.startswith(prefix):
            raise DamageError("it lists keys that were not asked for")
        return key

    space = xml.namespace(root)
    for element in root.iterfind(f"{space}Contents"):
        key, size = element.findtext(f"{space}Key"), element.findtext(f"{space}Size") or ""
        if not key or not (size.isascii() and size.isdigit() and len(size) <= _MOST_DIGITS):
            raise DamageError("it lists an object without a key or size")
        tag, time = element.findtext(f"{space}ETag"), element.findtext(f"{space}LastModified")
        objects.append(StoredObject(checked(key), int(size), f"{tag} {time}"))
    prefixes = [
        checked(element.findtext(f"{space}Prefix") or "")
        for element in root.iterfind(f"{space}CommonPrefixes")
    ]
    token = xml.text_of(root, "NextContinuationToken") or None
    if xml.text_of(root, "IsTruncated") == "true":
        if token is None:
            raise DamageError("it does not say where the list continues")
        return Page(objects, prefixes, token)
    return Page(objects, prefixes, None)
