"""The error tree. Every error a user can meet derives from `RedQueenError` and says what happened, to which
input, and what to do next."""

from __future__ import annotations


class RedQueenError(Exception):
    """Base of every error raised on purpose."""

    lasting = False
    """Whether trying again fails again: first somebody has to do what the message says."""


class NotFound(RedQueenError):
    """A key that was read does not exist in the object store."""

    def __init__(self, key: str, hint: str = "") -> None:
        super().__init__(f"nothing is stored under '{key}'{hint and f': {hint}'}")
        self.key = key


class Conflict(RedQueenError):
    """A conditional write lost: another writer came first. Read again, decide again."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(f"'{key}' was not written: {why}")
        self.key = key


class InvalidInput(RedQueenError):
    """Input that cannot be used as it is; the message names the input and the remedy."""

    lasting = True


class StoreUnusable(RedQueenError):
    """The object store does not honour what safety rests on (conditional writes)."""

    lasting = True


class BundleError(RedQueenError):
    """A model bundle failed verification and was not loaded."""


class Refused(RedQueenError):
    """An action was refused by a safety rule; the message is the reason shown to the person."""

    lasting = True


class ServiceUnavailable(RedQueenError):
    """A service that was asked (the scoring service, usually) did not answer."""
