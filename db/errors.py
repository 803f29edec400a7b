"""What can go wrong with the store, as problems a person can act on."""

from __future__ import annotations

from search.errors import BitfrontierError


class DatabaseUnavailable(BitfrontierError):
    """No connection to Postgres."""

    status = 503
    type = "database-unavailable"
    title = "The database cannot be reached"


class IdempotencyMismatch(BitfrontierError):
    """The idempotency key was used before with another body."""

    status = 422
    type = "idempotency-mismatch"
    title = "The idempotency key was used with another request"


class QuotaExceeded(BitfrontierError):
    """The API key has as many unfinished searches as it may."""

    status = 429
    type = "quota-exceeded"
    title = "Too many unfinished searches"


class AttemptsExhausted(BitfrontierError):
    """Every attempt at a search ended before the search did."""

    status = 500
    type = "attempts-exhausted"
    title = "The search was given up after its last attempt"
