"""How often a key may ask, and how often an address may present wrong ones, in a minute of this process."""

from __future__ import annotations

import time
from ipaddress import IPv6Address, ip_address, ip_network
from math import ceil

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from api.refusals import TooManyRequests
from db.keys import Key

FAILURES_PER_MINUTE = 30
# Whoever has an IPv6 address usually has all of its network.
IPV6_NETWORK = 64


class Rates:
    """What this process has answered in the last minute. Several API processes count apart."""

    def __init__(self) -> None:
        # Two counters for whoever asks, however much, and none once nothing came for two minutes: an attacker has as
        # many addresses as it likes.
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())

    async def spend(self, key: Key) -> dict[str, str]:
        """Count a request with `key`; headers that say how many are left. Raises TooManyRequests."""
        item = RateLimitItemPerMinute(key.rate_per_minute)
        if await self._limiter.hit(item, "key", str(key.id)):
            return (await self._left(item, "key", str(key.id)))[0]
        detail = f"the key '{key.name}' has a rate of {key.rate_per_minute} requests a minute"
        raise await self._refusal(detail, item, "key", str(key.id))

    async def check_failures(self, address: str) -> None:
        """Raise TooManyRequests when too many wrong keys came from `address`."""
        item, place = RateLimitItemPerMinute(FAILURES_PER_MINUTE), _network(address)
        if not await self._limiter.test(item, "address", place):
            detail = f"{FAILURES_PER_MINUTE} wrong keys came from this address within a minute"
            raise await self._refusal(detail, item, "address", place)

    async def count_failure(self, address: str) -> None:
        """A wrong key came from `address`."""
        await self._limiter.hit(RateLimitItemPerMinute(FAILURES_PER_MINUTE), "address", _network(address))

    async def _refusal(self, detail: str, item: RateLimitItemPerMinute, *names: str) -> TooManyRequests:
        headers, seconds = await self._left(item, *names)
        return TooManyRequests(detail, headers=headers | {"Retry-After": str(seconds)})

    async def _left(self, item: RateLimitItemPerMinute, policy: str, name: str) -> tuple[dict[str, str], int]:
        """The headers of draft-ietf-httpapi-ratelimit-headers, and the seconds until one more is granted."""
        reset, remaining = await self._limiter.get_window_stats(item, policy, name)
        window = item.get_expiry()
        wait = min(max(ceil(reset - time.time()), 1), window)
        headers = {
            "RateLimit-Policy": f'"{policy}";q={item.amount};w={window}',
            "RateLimit": f'"{policy}";r={remaining};t={wait}',
        }
        return headers, wait


def _network(address: str) -> str:
    try:
        found = ip_address(address)
    except ValueError:
        return address
    return str(ip_network((found, IPV6_NETWORK), strict=False)) if isinstance(found, IPv6Address) else address
