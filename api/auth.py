"""Who asks, and what they may."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from api.refusals import Unauthenticated
from db.grants import Scope
from db.keys import Key

GRANTS: dict[str, tuple[Scope, ...]] = {
    "read": ("read",),
    "write": ("read", "write"),
    "admin": ("read", "write", "admin"),
}
"""What the holder of a scope may do: read, also start and cancel searches, also see those of all keys."""


@dataclass(frozen=True, slots=True)
class Asker:
    """The holder of a key; anyone at all (`key` is None) where the service is open."""

    key: Key | None

    def may(self, scope: Scope) -> bool:
        """Whether the asker may do what `scope` is for."""
        return self.key is None or any(scope in GRANTS[held] for held in self.key.scopes)

    @property
    def owner(self) -> int | None:
        """The id of the key whose searches alone are to be seen; None: all searches."""
        return None if self.key is None or self.may("admin") else self.key.id

    @property
    def sees_all(self) -> bool:
        """Whether the searches of all keys are to be seen."""
        return self.owner is None


ANYONE = Asker(None)

asking: ContextVar[Asker | None] = ContextVar("asking", default=None)
"""Who sent the request in hand; None where nobody was asked for a key."""


async def get_asker() -> Asker:
    """Who sent the request in hand. Raises Unauthenticated where nobody was asked."""
    asker = asking.get()
    if asker is None:
        raise Unauthenticated("this needs a key")
    return asker
