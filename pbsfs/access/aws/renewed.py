"""A key that stays valid: fetched once for all who ask at the same time, and again when they ask later.

The bucket source asks before a key expires and after the object store has refused one, in worker threads,
several at once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from pbsfs.access.aws.keys import KeySource
from pbsfs.access.aws.services import NoServiceError
from pbsfs.base.errors import ConnectError, SourceError
from pbsfs.base.text import one_line
from pbsfs.sources.bucket.credentials import AwsCredentials

log = logging.getLogger(__name__)

KEEP = 10.0
"""Seconds for which a fetched key, or the failure to fetch a newer one, counts for all who ask."""


class Renewed:
    """The key of a source, as a `CredentialSource`."""

    def __init__(
        self,
        source: KeySource,
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock`: seconds since 1970. `ticks`: seconds that never go back."""
        self._source = source
        self._clock = clock
        self._ticks = ticks
        self._lock = threading.Lock()
        self._key: AwsCredentials | None = None
        self._fetched = float("-inf")
        self._is_known = False

    def current(self) -> AwsCredentials | None:
        """The key that is valid now. Raises AuthError, ConnectError."""
        with self._lock:
            if self._ticks() - self._fetched < KEEP and self._is_valid():
                return self._key
            try:
                self._key = self._source.fetch()
                self._is_known = True
            except SourceError as error:
                problem = error.problem if isinstance(error, NoServiceError) else error
                if self._is_valid():
                    log.warning("the key of the bucket was not renewed: %s", one_line(str(problem)))
                elif problem is not error and self._is_known:  # the service is there: it gave a key before
                    raise ConnectError(f"the key of the bucket was not renewed: {problem}") from None
                else:
                    raise
            self._fetched = self._ticks()
            return self._key

    def _is_valid(self) -> bool:
        if not self._is_known:
            return False
        return self._key is None or self._key.expires is None or self._clock() < self._key.expires
