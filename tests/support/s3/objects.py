"""The objects that a datastore's directory would be in a bucket, and their lists as XML."""

from __future__ import annotations

import os
from bisect import bisect_left
from pathlib import Path
from urllib.parse import quote_plus
from xml.sax.saxutils import escape

from pbsfs.sources import layout


def objects_of(datastore: Path, store: str) -> dict[str, Path]:
    """The files by their keys, in order. A directory that is a bucket's content already keeps its names."""
    root = f"{store}/" if store else ""
    is_bucket = (datastore / layout.METADATA).is_dir()
    found: dict[str, Path] = {f"{root}{layout.IN_USE}": Path(os.devnull)}
    for above, directories, names in os.walk(datastore):
        inside = Path(above).relative_to(datastore).as_posix()
        apart = is_bucket or inside.split("/")[0] == layout.CHUNKS
        base = f"{root}{inside}/" if apart else f"{root}{layout.METADATA}/{inside}/"
        base = base.replace("/./", "/")
        found.update((f"{base}{name}", Path(above, name)) for name in names)
        # A namespace is a directory on disk, and an empty object in a bucket.
        if Path(above).name == layout.NAMESPACES and not is_bucket:
            found.update((f"{base}{name}/.namespace", Path(os.devnull)) for name in directories)
    return dict(sorted(found.items()))


def page(
    objects: dict[str, Path],
    keys: list[str],
    *,
    bucket: str,
    prefix: str,
    delimiter: str,
    after: str,
    most: int,
    encoded: bool,
) -> str:
    """One answer to ListObjectsV2. `keys`: of `objects`, sorted. `after`: the last key or prefix of the
    answer before; it is the token."""
    entries: dict[str, Path | None] = {}
    number = bisect_left(keys, max(prefix, after))
    while number < len(keys) and len(entries) <= most:
        key = keys[number]
        number += 1
        if not key.startswith(prefix):
            break
        inside, found, _rest = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
        shown = f"{prefix}{inside}{found}" if found else key
        if shown > after:
            entries[shown] = None if found else objects[key]
        if found:  # all others of it come next
            number = bisect_left(keys, f"{shown}\U0010ffff")
    shown_keys = list(entries)[:most]
    truncated = len(entries) > len(shown_keys)

    def text(value: str) -> str:
        return quote_plus(value, safe="/") if encoded else escape(value)

    parts = [
        (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{bucket}</Name><Prefix>{text(prefix)}</Prefix><KeyCount>{len(shown_keys)}</KeyCount>"
            f"<MaxKeys>{most}</MaxKeys><IsTruncated>{str(truncated).lower()}</IsTruncated>"
        )
    ]
    if encoded:
        parts.append("<EncodingType>url</EncodingType>")
    if truncated:
        parts.append(f"<NextContinuationToken>{escape(shown_keys[-1])}</NextContinuationToken>")
    for key in shown_keys:
        entry = entries[key]
        if entry is None:
            parts.append(f"<CommonPrefixes><Prefix>{text(key)}</Prefix></CommonPrefixes>")
            continue
        try:
            stat = entry.stat()
        except FileNotFoundError:  # removed meanwhile
            continue
        size = stat.st_size if entry.is_file() else 0
        parts.append(
            f"<Contents><Key>{text(key)}</Key><LastModified>2025-07-14T14:20:02.000Z</LastModified>"
            f"<ETag>&quot;{stat.st_ino:x}-{stat.st_mtime_ns:x}&quot;</ETag><Size>{size}</Size>"
            "<StorageClass>STANDARD</StorageClass></Contents>"
        )
    parts.append("</ListBucketResult>")
    return "".join(parts)
