"""The two lines of the real server that the reference server answers like."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Release:
    """What one release says where the two lines differ.

    `version`, `release`, `repoid`: as /version tells. `newer`: whether it is of the 4.x line. `max_streams`,
    `max_header_list`: what its sessions announce.
    """

    version: str
    release: str
    repoid: str
    newer: bool
    max_streams: int | None
    max_header_list: int


PBS_3 = Release("3.2", "4", "4940514b0f05d6cd6a5f711edfdd47c1fa41b537", False, None, 16 << 20)
PBS_4 = Release("4.2", "3", "bc863d45e", True, 200, 16 << 10)
