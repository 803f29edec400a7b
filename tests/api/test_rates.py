"""How much one key, and one address, may ask in a minute."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from fastapi.testclient import TestClient

from api.rates import FAILURES_PER_MINUTE, Rates
from api.refusals import TooManyRequests

pytestmark = pytest.mark.usefixtures("clock")

Bearer = Callable[..., dict[str, str]]

WRONG = {"Authorization": "Bearer bf_wrong"}


def test_key_has_a_rate_of_its_own(keyed: TestClient, bearer: Bearer) -> None:
    slow, other = bearer("slow", rate_per_minute=3), bearer("other")
    left = []
    for _ in range(3):
        answer = keyed.get("/v1/schemes", headers=slow)
        assert answer.status_code == 200
        assert answer.headers["ratelimit-policy"] == '"key";q=3;w=60'
        policy, remaining, seconds = answer.headers["ratelimit"].split(";")
        assert policy == '"key"'
        assert 1 <= int(seconds.removeprefix("t=")) <= 60
        left.append(remaining)
    assert left == ["r=2", "r=1", "r=0"]
    refused = keyed.get("/v1/schemes", headers=slow)
    assert refused.status_code == 429
    assert refused.json()["type"] == "urn:bitfrontier:problem:too-many-requests"
    assert "'slow'" in refused.json()["detail"]
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.headers["ratelimit"].startswith('"key";r=0;t=')
    assert keyed.get("/v1/schemes", headers=other).status_code == 200
    assert keyed.get("/healthz", headers=slow).status_code == 200


def test_what_is_refused_counts_too(keyed: TestClient, bearer: Bearer) -> None:
    headers = bearer("reader", "read", rate_per_minute=2)
    answers = [keyed.post("/v1/searches", json={}, headers=headers).status_code for _ in range(3)]
    assert answers == [403, 403, 429]


@pytest.mark.parametrize("way", ["header", "cookie", "login"])
def test_address_that_sends_wrong_keys_is_held_off(keyed: TestClient, bearer: Bearer, way: str) -> None:
    def guess() -> int:
        if way == "login":
            return keyed.post("/login", data={"key": "bf_wrong"}).status_code
        headers = WRONG if way == "header" else {"Cookie": "bitfrontier_key=bf_wrong"}
        return keyed.get("/v1/schemes", headers=headers).status_code

    known, unused = bearer("known"), bearer("unused")
    assert keyed.get("/v1/schemes", headers=known).status_code == 200
    assert {guess() for _ in range(FAILURES_PER_MINUTE)} == {401}
    assert guess() == 429
    held = keyed.get("/v1/schemes", headers=unused)
    assert held.status_code == 429, "no key is looked up any more"
    assert 1 <= int(held.headers["retry-after"]) <= 60
    assert keyed.get("/v1/schemes", headers=known).status_code == 200, "whoever shares the address is not locked out"
    assert keyed.get("/v1/schemes").status_code == 401, "and no key is no wrong key"


def test_addresses_are_held_off_apart_and_ipv6_by_network() -> None:
    async def guess(rates: Rates) -> None:
        for number in range(FAILURES_PER_MINUTE):
            await rates.count_failure("192.0.2.1")
            await rates.count_failure(f"2001:db8:0:7::{number:x}")
        for address in ("192.0.2.1", "2001:db8:0:7:ffff::1"):
            with pytest.raises(TooManyRequests):
                await rates.check_failures(address)
        for address in ("192.0.2.2", "2001:db8:0:8::1", "testclient", ""):
            await rates.check_failures(address)

    asyncio.run(guess(Rates()))


def test_what_was_asked_is_forgotten_little_by_little(clock: SimpleNamespace) -> None:
    async def granted(rates: Rates) -> int:
        for number in range(FAILURES_PER_MINUTE + 1):
            try:
                await rates.check_failures("192.0.2.1")
            except TooManyRequests:
                return number
            await rates.count_failure("192.0.2.1")
        return FAILURES_PER_MINUTE + 1

    async def over_minutes() -> list[int]:
        rates, granted_at = Rates(), []
        for clock.now in (59.0, 61.0, 90.0, 240.0):
            granted_at.append(await granted(rates))
        return granted_at

    assert asyncio.run(over_minutes()) == [FAILURES_PER_MINUTE, 1, FAILURES_PER_MINUTE // 2 - 1, FAILURES_PER_MINUTE]


def test_open_service_has_no_rates(client: TestClient) -> None:
    answer = client.get("/v1/schemes", headers=WRONG)
    assert answer.status_code == 200
    assert "ratelimit" not in answer.headers
