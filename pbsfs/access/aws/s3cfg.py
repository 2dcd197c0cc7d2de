"""The S3 endpoints of a Proxmox Backup Server, from its `s3.cfg`: address, certificate and key.

`datastore.cfg` beside it says which endpoint a datastore has. Source of the form: the server's `s3.cfg` and
`datastore.cfg`; "S3 Datastore Backend" in its documentation. Synchronous.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pbsfs.base.errors import UsageError
from pbsfs.base.text import first_of, quoted

MAX_FILE_SIZE = 1 << 20

DEFAULT_REGION = "us-west-1"
"""The region of a server whose configuration has none, in names and signatures. Source: `S3Client` of Proxmox
Backup Server 4.2."""

_HEADER = re.compile(r"(\S+):\s*(\S+)\s*")
_BUCKET = "{{bucket}}."


@dataclass(frozen=True, slots=True)
class S3Endpoint:
    """An endpoint of the file, with its templates filled in. `place`: the file and the name, for errors."""

    place: str
    endpoint: str
    region: str
    path_style: bool
    fingerprint: str | None
    access_key: str
    secret_key: str = field(repr=False)
    readable_by_others: bool = False


def read_endpoint(file: Path, bucket: str, store: str) -> S3Endpoint:
    """The endpoint of a datastore: the one that `datastore.cfg` beside `file` names, or else the only one.

    Raises UsageError; errors show no value of a setting that could be a secret.
    """
    endpoints = dict(_sections(file, "s3-endpoint"))
    if not endpoints:
        raise UsageError(f"{file}: it has no s3-endpoint; give the server's s3.cfg")
    name = _client_of(file.with_name("datastore.cfg"), bucket, store)
    if name is None:
        if len(endpoints) > 1:
            raise UsageError(
                f"{file}: it has {len(endpoints)} endpoints ({first_of(endpoints)}); keep datastore.cfg "
                "beside it, or leave the right one in a copy"
            )
        (name,) = endpoints
    if name not in endpoints:
        raise UsageError(
            f"{file}: no s3-endpoint {quoted(name)}, which datastore.cfg names; restore it there"
        )
    found = _endpoint(f"{file}: s3-endpoint {name}", endpoints[name], bucket)
    return replace(found, readable_by_others=bool(file.stat().st_mode & stat.S_IROTH))


def _endpoint(place: str, settings: Mapping[str, str], bucket: str) -> S3Endpoint:
    for key in ("endpoint", "access-key", "secret-key"):
        if not settings.get(key):
            raise UsageError(f"{place} has no {key}; add it")
    region = settings.get("region") or DEFAULT_REGION
    host = settings["endpoint"].replace("{{region}}", region)
    path_style = settings.get("path-style", "").lower() in ("1", "on", "yes", "true")
    if not path_style:
        begin = next((each for each in (_BUCKET, f"{bucket}.") if host.startswith(each)), None)
        if begin is None:
            raise UsageError(f"{place}: its endpoint names no bucket; set path-style true")
        host = host.removeprefix(begin)
    if "{{" in host:
        raise UsageError(f"{place}: its endpoint has a template that pbsfs does not know; give --endpoint")
    port = settings.get("port")
    return S3Endpoint(
        place,
        f"https://{host}:{port}" if port else f"https://{host}",
        region,
        path_style,
        settings.get("fingerprint"),
        settings["access-key"],
        settings["secret-key"],
    )


def _client_of(file: Path, bucket: str, store: str) -> str | None:
    """The endpoint that `datastore.cfg` names for a datastore; None without the file or the datastore."""
    if not file.exists():
        return None
    for name, settings in _sections(file, "datastore"):
        backend = dict(each.partition("=")[::2] for each in settings.get("backend", "").split(","))
        if name == store and backend.get("type") == "s3" and backend.get("bucket") == bucket:
            return backend.get("client")
    return None


def _sections(file: Path, kind: str) -> Iterator[tuple[str, Mapping[str, str]]]:
    """The sections of one kind: their names and settings. Others are passed over."""
    try:
        with open(file, "rb") as opened:
            data = opened.read(MAX_FILE_SIZE + 1)
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}; check the path and who may read it") from None
    try:
        lines = data.decode().splitlines()
    except UnicodeDecodeError:
        lines = []
    if len(data) > MAX_FILE_SIZE or (data and not lines):
        raise UsageError(f"{file}: not a configuration of a Proxmox Backup Server; give its s3.cfg")
    found: dict[str, dict[str, str]] = {}
    settings: dict[str, str] | None = None
    for line in lines:
        if not line[:1].isspace() and (header := _HEADER.fullmatch(line)):
            settings = found.setdefault(header[2], {}) if header[1] == kind else None
        elif line[:1].isspace() and line.strip() and settings is not None:
            key, *value = line.split(None, 1)
            settings[key] = value[0].strip() if value else ""
    yield from found.items()
