"""The user at a terminal, who may be asked. The command line has the one implementation."""

from __future__ import annotations

import abc

from pbsfs.base.secret import Secret


class Terminal(abc.ABC):
    """Asks the user. A process without a terminal has None instead."""

    @abc.abstractmethod
    def password(self, text: str) -> Secret:
        """What the user types; it is not shown."""

    @abc.abstractmethod
    def confirm(self, text: str) -> bool:
        """Whether the user agrees."""
