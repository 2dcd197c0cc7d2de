"""By what a server is trusted: a fingerprint that was given or accepted before, a CA, or the user's answer.

Asked once, before the password. Synchronous.
"""

from __future__ import annotations

import logging
import re
import ssl
from collections.abc import Mapping
from pathlib import Path

from pbsfs.access.fingerprints import fingerprints_file, known_fingerprint, remember_fingerprint
from pbsfs.access.terminal import Terminal
from pbsfs.base.errors import TrustError, UsageError
from pbsfs.runtime.places import config_home
from pbsfs.sources.http.peer import Peer
from pbsfs.sources.http.proxy import Proxy
from pbsfs.sources.http.tls import (
    Trust,
    connect,
    parse_fingerprint,
    peek_fingerprint,
    show_fingerprint,
)

log = logging.getLogger(__name__)

MAX_CA_SIZE = 1 << 20
"""Bytes of a file of CAs; the bundle of a distribution has some 200 KiB."""

_CERTIFICATE = re.compile(b"-----BEGIN CERTIFICATE-----[^-]*-----END CERTIFICATE-----")


def read_ca(file: Path) -> str:
    """The certificates in a file in PEM format, at least one. Raises UsageError."""
    try:
        with open(file, "rb") as opened:
            content = opened.read(MAX_CA_SIZE + 1)
    except OSError as error:
        raise UsageError(f"ca-file {file}: {error.strerror}; check the path of ca-file") from None
    # Without the text between them, which need not be ASCII.
    found = b"\n".join(_CERTIFICATE.findall(content)) if len(content) <= MAX_CA_SIZE else b""
    try:
        certificates = found.decode("ascii")
        if certificates:
            ssl.create_default_context(cadata=certificates)
            return certificates
    except (ssl.SSLError, ValueError):
        pass
    raise UsageError(f"ca-file {file}: not a certificate; give a file in PEM format") from None


def find_trust(
    fingerprint: str | None,
    peer: Peer,
    proxy: Proxy | None,
    environment: Mapping[str, str],
    terminal: Terminal | None,
) -> Trust:
    """`fingerprint`: the one that was given, if any; it is the only one that counts.

    Without one, asks at the terminal about a server that is not known. Raises UsageError, and what
    connecting raises.
    """
    if fingerprint:
        return Trust(pinned=parse_fingerprint(fingerprint))
    home = config_home(environment)
    file = None if home is None else fingerprints_file(home)
    trust = Trust(known=None if file is None else known_fingerprint(file, peer.host))
    if trust.known is not None or terminal is None:
        return trust
    try:
        connect(peer, trust, proxy).socket.close()
    except TrustError:
        found = peek_fingerprint(peer, proxy)
        shown = show_fingerprint(found)
        if not terminal.confirm(
            f"{peer.address} is not known yet. The SHA-256 fingerprint of its certificate is\n"
            f"{shown}\nIs that what {peer.kind.shown_by} shows? Connect, and remember it"
        ):
            raise
        try:
            if file is None:
                raise UsageError("cannot remember the fingerprint: this user has no home directory")
            remember_fingerprint(file, peer.host, found)
        except UsageError as error:
            log.warning("%s; give it with %s next time", error, peer.kind.accept)
        return Trust(known=found)
    return trust
