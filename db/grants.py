"""What a key may allow, and how much. Without the tables, so that a client need not load them."""

from __future__ import annotations

from typing import Literal, get_args

Scope = Literal["read", "write", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

MAX_OPEN = 100
"""Unfinished searches at once, unless a key says otherwise."""
RATE_PER_MINUTE = 600
"""Requests a minute of each API process, unless a key says otherwise."""
