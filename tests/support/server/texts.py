"""What real servers answer with status 400 when something is wrong, by what it means.

Of proxmox-backup 3.2.4 to 4.2.3: recorded, seen on servers with a failing disk and a failing object store, or
read in its source.
"""

from __future__ import annotations

_DIGEST = "56fe19f370f0a6e213e78f50e535d179bcf54d166be5096db68cf5c2584e7b14"
_CHUNK = f'"/datastore/.chunks/56fe/{_DIGEST}"'
_SNAPSHOT = "/datastore/vm/100/2023-11-14T22:13:20Z"
_INDEX = f'"{_SNAPSHOT}/drive-scsi0.img.fidx"'

NO_DESCRIPTORS = "Too many open files (os error 24)"
INTERRUPTED = (
    'Unable to acquire lock "/etc/proxmox-backup/.datastore.lck" - Interrupted system call (os error 4)'
)
AWAY = "unexpected status code 503 Service Unavailable"

BROKEN_CHUNKS = (
    f"reading file {_CHUNK} failed: No such file or directory (os error 2)",
    f"reading file {_CHUNK} failed: Input/output error (os error 5)",
    f"reading file {_CHUNK} failed: Bad message (os error 74)",
    f"reading file {_CHUNK} failed: Structure needs cleaning (os error 117)",
    f"could not fetch object with key {_DIGEST}",
    f"cannot find chunk with digest {_DIGEST}",
    "Data blob has wrong CRC checksum.",
    "unable to parse raw blob - wrong magic",
    "blob too small (0 bytes).",
    "encrypted blob too small (11 bytes).",
)

PASSING_CHUNKS = (
    f"reading file {_CHUNK} failed: {NO_DESCRIPTORS}",
    f"reading file {_CHUNK} failed: Permission denied (os error 13)",
    f"reading file {_CHUNK} failed: Stale file handle (os error 116)",
    f"reading file {_CHUNK} failed: Transport endpoint is not connected (os error 107)",
    f"inserting chunk on store 'store1' failed for {_DIGEST} - No space left on device (os error 28)",
    # The server's cache, and not the object store, has no such file or can't read it.
    f"inserting chunk on store 'store1' failed for {_DIGEST} - No such file or directory (os error 2)",
    "No such file or directory (os error 2)",
    "Input/output error (os error 5)",
    AWAY,
    "unexpected status code 500 Internal Server Error",
    "unexpected status code 429 Too Many Requests",
    "unexpected status code 403 Forbidden",
    "request timeout reached",
    "client error (Connect)",
    "failed to send request exceeding retries",
    INTERRUPTED,
)

MISSING_FILES = (
    f"Unable to open fixed index {_INDEX} - No such file or directory (os error 2)",
    "File open failed: No such file or directory (os error 2)",
)

BROKEN_FILES = (
    f"Unable to open fixed index {_INDEX} - got unknown magic number",
    f"Unable to open fixed index {_INDEX} - index too small (7)",
    f"Unable to open fixed index {_INDEX} - unexpected index size: 33 != 32 * ceil(9 / 4)",
    f"Unable to open fixed index {_INDEX} - Input/output error (os error 5)",
)

PASSING_FILES = (
    f"Unable to open fixed index {_INDEX} - {NO_DESCRIPTORS}",
    f"File open failed: {NO_DESCRIPTORS}",
    f"Unable to open fixed index {_INDEX} - Permission denied (os error 13)",
    f"Unable to open fixed index {_INDEX} - Stale file handle (os error 116)",
    INTERRUPTED,
)

MAINTENANCE = (
    "datastore 'store1' is unavailable: offline maintenance mode: datastore is being deleted, I fear",
    "datastore 'store1' is unavailable: offline maintenance mode",
    "datastore 'store1' is unavailable: S3 refresh maintenance mode: new bucket",
    "datastore 'store1' is unavailable: datastore is being unmounted",
    "datastore 'store1' is not mounted",
)

DELETING = "datastore 'store1' is unavailable: datastore is being deleted"

_DEBUG_DUMP = (
    'BackupDir { store: "store1", ns: BackupNamespace { inner: [], len: 0 }, dir: BackupDir { group: '
    'BackupGroup { ty: Vm, id: "100" }, time: 1700000000 }, backup_time_string: "2023-11-14T22:13:20Z" }'
)

LOCKED = (
    f'unable to acquire lock on snapshot directory "{_SNAPSHOT}" - locked by another operation',
    f"while reading snapshot '{_DEBUG_DUMP}'",
)
"""Of servers up to 3.3.4, and since."""
