"""The plugin's parameters: from `key=value` words to the source and the path that is exported.

The names are those of the C plugins for the same purpose, and of the command line. nbdkit passes them one by
one, before it daemonizes. Synchronous; one thread.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pbsfs.access.caching import parse_disk_size
from pbsfs.access.config import configure
from pbsfs.access.credentials import PASSWORD_VARIABLE, names_secret
from pbsfs.access.description import Description
from pbsfs.access.options import SourceOptions, resolve
from pbsfs.access.profiles import Profile
from pbsfs.access.resolve import describe
from pbsfs.access.sizes import parse_cache_size, parse_rate
from pbsfs.access.tickets import Tickets
from pbsfs.base.errors import UsageError
from pbsfs.base.names import BACKUP_TYPES
from pbsfs.base.secret import Secret
from pbsfs.nbd.passwords import password_of
from pbsfs.reader.damage import ZeroedRanges
from pbsfs.runtime.logs import FORMAT_VARIABLE, parse_format
from pbsfs.runtime.memory import DEFAULT_CACHE_SIZE
from pbsfs.sources.server.repository import Repository
from pbsfs.tasks.metrics import MetricsAddress

log = logging.getLogger(__name__)

PARAMETERS = {
    "profile": "Read from the source of this profile in the configuration (or PBSFS_PROFILE).",
    "repo": "Read from a server: [[user@realm[!token]@]host[:port]:]datastore (or PBS_REPOSITORY).",
    "server": "Read from this server, given by the parts of a repository (or PBS_SERVER).",
    "port": "Connect to this port of server= (or PBS_PORT; default: 8007).",
    "datastore": "Read this datastore of server= (or PBS_DATASTORE).",
    "auth_id": "Log in to server= as this user or token (or PBS_AUTH_ID; default: root@pam).",
    "password": "Take the password, or the secret of an API token, from the first line of a file (+FILE), of "
    "standard input (-) or of a descriptor (-FD) (or PBS_PASSWORD, _FD, _FILE, _CMD). A password as a word "
    "works with a warning: every user can see it in the list of processes.",
    "fingerprint": "Trust only the certificate with this SHA-256 (or, of a server, PBS_FINGERPRINT; default: "
    "the client's file of known fingerprints).",
    "ca_file": "Trust only certificates that a CA in this PEM file signed (default: the system's CAs).",
    "bucket": "Read the datastore in this S3 bucket, s3://BUCKET/DATASTORE, without a server (or "
    "PBSFS_BUCKET).",
    "endpoint": "Reach the bucket at this address, https://HOST[:PORT] (or AWS_ENDPOINT_URL_S3; default: "
    "AWS's of the region).",
    "region": "Sign requests for this region (or AWS_REGION).",
    "path_style": "Name the bucket in the path (true), or in the host's name (false) (default: true if there "
    "is an endpoint that is not AWS's).",
    "aws_profile": "Take the access key from this profile in the files of AWS's tools (or AWS_PROFILE).",
    "s3_config": "Take endpoint and access key of the bucket from this s3.cfg of a Proxmox Backup Server.",
    "anonymous": "Read a public bucket, without an access key (true or false; default: false).",
    "namespace": "Start at this namespace (or PBS_NAMESPACE).",
    "datastore_dir": "Read the datastore in this directory, without a server (or PBSFS_DATASTORE_DIR).",
    "keyfile": "Decrypt with this key file, or those in this directory; may be repeated.",
    "type": "Serve images of a group of this type: vm, ct or host.",
    "id": "Serve images of the group of type= with this ID.",
    "vmid": "Serve images of this virtual machine; short for type=vm id=.",
    "timestamp": "Serve images of this snapshot of the group; latest is the newest (default: all snapshots).",
    "image": "Serve this image of the snapshot, as the default export (default: all images).",
    "path": "Serve the image or the directory at this path, such as vm/103/latest/drive-scsi0.img, instead "
    "of vmid=, type=, id=, timestamp= and image=.",
    "cache_size": "Keep decoded chunks in this much memory (default: 256M).",
    "limit_rate": "Fetch at most this much in a second from the source, such as 50M (default: no limit).",
    "cache_dir": "Keep what was fetched in this directory, which several programs may share (or "
    "PBSFS_CACHE_DIR; default: nowhere).",
    "cache_disk_size": "Use at most this much of the disk for cache_dir= (or PBSFS_CACHE_DISK_SIZE; default: "
    "50G).",
    "offline": "Do not ask the source: read only what cache_dir= holds (true or false; default: false).",
    "connections": "Open this many connections to the server for each snapshot, 1 to 16 (default: by the "
    "round trip).",
    "nbd_connections": "Serve at most this many connections of NBD clients at once, 1 to 10000 (default: "
    "128). nbdkit closes further ones at once, and logs each.",
    "retry_timeout": "Retry for this many seconds while the server is unreachable (default: 120).",
    "on_damage": "Fail reads of damaged data, or return zeros and report their ranges (fail or zero; "
    "default: fail).",
    "metrics": "Serve what the server did as OpenMetrics on this Unix socket or loopback port: PATH or "
    "127.0.0.1:PORT (default: nowhere).",
    "log_format": "Log lines of text (text), or one JSON object per line (json) (or PBSFS_LOG_FORMAT; "
    "default: text).",
}
"""Every parameter that a user may give, and what it does. `keyfile` may be given more than once."""

DEFAULT_NBD_CONNECTIONS = 128
"""Connections of clients at once. nbdkit has 16 threads for each, and copying programs open four or more."""

MAX_NBD_CONNECTIONS = 10_000

HANDED_OVER = ("source_fd", "ready_fd")
"""Parameters that `pbsfs nbd` adds: descriptors of the source's description and of the pipe it waits on."""

_PLACE = ("type", "id", "vmid", "timestamp", "image")


@dataclass(frozen=True, slots=True)
class Settings:
    """What the parameters say.

    `path`: of an image in the tree, or of a directory whose images are all exported. `missing`: the parameter
    that is required, because the others name one image; `path` is the directory to choose from then.
    `ready_fd`: the pipe that gets a byte when clients can connect. `filters`: those that nbdkit uses.
    `nbd_connections`: the most connections of clients at once. `log_format`: see `LogOptions`.
    """

    source: Description
    path: str
    missing: str | None = None
    cache_size: int = DEFAULT_CACHE_SIZE
    zeroed: ZeroedRanges | None = None
    ready_fd: int | None = None
    filters: frozenset[str] = frozenset()
    nbd_connections: int = DEFAULT_NBD_CONNECTIONS
    metrics: MetricsAddress | None = None
    log_format: str | None = None


class Parameters:
    """Collects the parameters, and turns them into settings."""

    def __init__(self, environment: Mapping[str, str] = os.environ, arguments: Sequence[str] = ()) -> None:
        """`arguments`: nbdkit's command line."""
        self._environment = environment
        self._filters = filters_of(arguments)
        self._given: dict[str, str] = {}
        self._keyfiles: list[Path] = []
        self._password: Secret | None = None
        self._shows_password = False

    def take(self, key: str, value: str) -> None:
        """Takes one parameter. Raises UsageError."""
        name = key.replace("-", "_")
        if name not in PARAMETERS and name not in HANDED_OVER:
            raise UsageError(f"parameter '{key}': unknown; use {', '.join(PARAMETERS)}")
        if name == "keyfile":
            if not value:
                raise UsageError("keyfile=: empty; give the path of a key file")
            self._keyfiles.append(Path(value))
            return
        if name in self._given:
            raise UsageError(f"{key}=: given twice; give it once")
        self._given[name] = "" if name == "password" else value
        if name == "password":
            self._password = password_of(value)
            self._shows_password = value[:1] not in ("", "+", "-")

    def log_format(self) -> str | None:
        """What parameters or environment give; None if neither does. Raises UsageError."""
        text = self._given.get("log_format") or self._environment.get(FORMAT_VARIABLE)
        return parse_format(text) if text else None

    def settings(self) -> Settings:
        """The settings. Raises UsageError, KeyFileError, PasswordError, and the errors of the description."""
        given = self._given
        if self._shows_password:  # not earlier: the format of the log may come in a later parameter
            log.warning(
                "password= on the command line can be read by every user of this machine; "
                "use password=+FILE, password=- or PBS_PASSWORD_FILE instead"
            )
        path, missing = self._path()
        if "cache_size" in given:
            parse_cache_size(given["cache_size"])  # before anything that may ask the server
        on_damage = given.get("on_damage", "fail")
        if on_damage not in ("fail", "zero"):
            raise UsageError(f"on_damage={on_damage}: unknown; use fail or zero")
        source, profile = self._source()
        cache_size = given.get("cache_size", None if profile is None else profile.cache_size)
        return Settings(
            source=source,
            path=path,
            missing=missing,
            cache_size=DEFAULT_CACHE_SIZE if cache_size is None else parse_cache_size(cache_size),
            zeroed=ZeroedRanges() if on_damage == "zero" else None,
            ready_fd=self._whole("ready_fd", 0, 1 << 20),
            filters=self._filters,
            nbd_connections=self._whole("nbd_connections", 1, MAX_NBD_CONNECTIONS) or DEFAULT_NBD_CONNECTIONS,
            metrics=MetricsAddress.parse(given["metrics"]) if given.get("metrics") else None,
            log_format=self.log_format() or (None if profile is None else profile.log_format),
        )

    def _source(self) -> tuple[Description, Profile | None]:
        """The source that `pbsfs nbd` handed over, otherwise the one that parameters, environment or a
        profile name; and that profile."""
        fd = self._whole("source_fd", 0, 1 << 20)
        if fd is not None:
            return Description.taken_over(fd), None
        given = self._given
        options = SourceOptions(
            repository=given.get("repo") or None,
            datastore_dir=self._directory("datastore_dir"),
            fingerprint=given.get("fingerprint") or None,
            retry_timeout=self._number("retry_timeout", 0, 1e9),
            connections=self._whole("connections", 1, 16),
            limit_rate=parse_rate(given["limit_rate"]) if "limit_rate" in given else None,
            cache_dir=self._directory("cache_dir"),
            cache_disk_size=parse_disk_size(given["cache_disk_size"]) if "cache_disk_size" in given else None,
            offline=self._truth("offline") or False,
            keyfiles=tuple(self._keyfiles),
            port=self._whole("port", 1, 65535),
            namespace=given.get("namespace"),
            server=given.get("server") or None,
            datastore=given.get("datastore") or None,
            auth_id=given.get("auth_id") or None,
            profile=given.get("profile") or None,
            ca_file=self._file("ca_file"),
            bucket=given.get("bucket") or None,
            endpoint=given.get("endpoint") or None,
            region=given.get("region") or None,
            path_style=self._truth("path_style"),
            anonymous=self._truth("anonymous"),
            aws_profile=given.get("aws_profile") or None,
            s3_config=self._file("s3_config"),
        )
        configured = configure(options, self._environment, _parameter)
        options = resolve(configured.options, configured.environment, _parameter)
        secret = self._secret(options, configured.environment)
        return describe(options, configured.environment, None, secret=secret), configured.profile

    def _path(self) -> tuple[str, str | None]:
        """The path in the tree, and the parameter that is missing if one image is meant."""
        given = {name: self._given[name] for name in _PLACE if self._given.get(name)}
        if self._given.get("path"):
            if given:
                raise UsageError(
                    f"path=: names the image alone; leave out {', '.join(f'{name}=' for name in given)}"
                )
            return self._given["path"].strip("/"), None
        if "vmid" in given:
            if "id" in given or given.get("type", "vm") != "vm":
                raise UsageError("vmid= is short for type=vm id=; give one or the other")
            given |= {"type": "vm", "id": given.pop("vmid")}
        if "type" in given and given["type"] not in BACKUP_TYPES:
            raise UsageError(f"type={given['type']}: unknown; use {', '.join(BACKUP_TYPES)}")
        if "type" not in given and given:
            raise UsageError(
                "group: not named; give vmid=, or type= and id=, or path= instead of all of them"
            )
        steps: list[str] = []
        order = ("type", "id", "timestamp", "image")
        for place, name in enumerate(order):
            if name not in given:
                return "/".join(steps), name if any(later in given for later in order[place:]) else None
            if "/" in given[name]:
                raise UsageError(f"{name}={given[name]}: contains a slash; use path= for a path")
            steps.append(given[name])
        return "/".join(steps), None

    def _directory(self, name: str) -> Path | None:
        if name not in self._given:
            return None
        if not self._given[name]:
            what = "the directory of a datastore" if name == "datastore_dir" else "a directory"
            raise UsageError(f"{name}=: empty; give {what}")
        # nbdkit changes its directory when it daemonizes
        return Path(os.path.abspath(self._given[name]))

    def _file(self, name: str) -> Path | None:
        return Path(os.path.abspath(self._given[name])) if self._given.get(name) else None

    def _truth(self, name: str) -> bool | None:
        text = self._given.get(name)
        if not text:
            return None
        if text not in ("true", "false"):
            raise UsageError(f"{name}={text}: unknown; use true or false")
        return text == "true"

    def _secret(self, options: SourceOptions, environment: Mapping[str, str]) -> Secret | None:
        """The password parameter; None to use the environment or profile.

        Raises UsageError if none of them has a password.
        """
        if options.repository is None or self._password is not None or options.offline:
            return self._password
        if (
            options.password is None
            and not names_secret(PASSWORD_VARIABLE, "password", environment)
            and Tickets(environment).find(Repository.parse(options.repository)) is None
        ):
            raise UsageError(
                "no password: give password=+FILE, password=- to be asked for it, or set PBS_PASSWORD "
                "(or PBS_PASSWORD_FD, _FILE, _CMD); for an API token it is the token's secret; "
                "or run pbsfs login at a terminal"
            )
        return None

    def _whole(self, name: str, least: int, most: int) -> int | None:
        number = self._number(name, least, most)
        if number is not None and number != int(number):
            raise UsageError(f"{name}={self._given[name]}: not a whole number")
        return None if number is None else int(number)

    def _number(self, name: str, least: float, most: float) -> float | None:
        text = self._given.get(name)
        if not text:
            return None
        try:
            number = float(text)
        except ValueError:
            number = float("nan")
        if not least <= number <= most:
            raise UsageError(f"{name}={text}: not a number from {least:g} to {most:g}")
        return number


def _parameter(name: str) -> str:
    """The parameter for a field of `SourceOptions`."""
    return "repo=" if name == "repository" else f"{name}="


def filters_of(arguments: Sequence[str]) -> frozenset[str]:
    """The names of the filters on nbdkit's command line: `--filter=cow`, `--filter cow`, or by path.

    nbdkit accepts every unique beginning of a long option.
    """
    found = set()
    for word, following in pairwise([*arguments, ""]):
        option, equals, value = word.partition("=")
        if len(option) > 3 and "--filter".startswith(option):
            name = value if equals else following
            found.add(os.path.basename(name).removeprefix("nbdkit-").removesuffix("-filter.so"))
    return frozenset(found)
