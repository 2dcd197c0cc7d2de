"""Secrets as values that do not show themselves. Immutable, for any thread."""

from __future__ import annotations


class Secret:
    """A password or token secret. Its value is in `reveal()` only: not in `repr`, `str` or a pickle."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "Secret(…)"

    def __reduce__(self) -> str:
        raise TypeError("a secret is not to be copied out")


class Ticket(Secret):
    """The ticket of a login at a server, instead of a password.

    `password`: for a new login when the ticket is no longer valid; None if that takes more than a password.
    """

    __slots__ = ("password",)

    def __init__(self, value: str, password: Secret | None = None) -> None:
        super().__init__(value)
        self.password = password
