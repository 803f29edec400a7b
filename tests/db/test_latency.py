"""Stored latency profiles: nothing that was measured is lost, and the last measured comes first."""

from dataclasses import replace
from itertools import islice

import pytest
from sqlalchemy import Engine

from db.latency import get_profile, latency_of, list_profiles, put_profile
from search.errors import InvalidRequest
from search.latency_profile import LatencyProfile
from search.request import SearchRequest
from tests.aside import aside, results
from tests.search.profiles import DEVICE, profile_of
from tests.search.spaces import decoder

PROFILE = profile_of(decoder(), ("w4a16g32", "w8a8"))


def parts(profile: LatencyProfile, size: int) -> list[LatencyProfile]:
    starts = range(0, len(profile.times), size)
    return [replace(profile, times=dict(islice(profile.times.items(), at, at + size)), checks={}) for at in starts]


def test_a_profile_is_found_by_its_key_as_it_was_stored(engine: Engine) -> None:
    assert put_profile(engine, PROFILE) == PROFILE
    assert get_profile(engine, PROFILE.key) == PROFILE
    assert get_profile(engine, "0" * 16) is None


def test_what_is_measured_later_is_added_and_replaces_what_was_measured_before(engine: Engine) -> None:
    for part in parts(PROFILE, 3):
        put_profile(engine, part)
    put_profile(engine, replace(PROFILE, times={}))
    assert get_profile(engine, PROFILE.key) == PROFILE
    (product, *_), (*_, other) = PROFILE.times, PROFILE.times.values()
    again = put_profile(engine, replace(PROFILE, times={product: other}, created="2027-01-01T00:00:00+00:00"))
    assert again.times == {**PROFILE.times, product: other}
    assert again.created.startswith("2027")
    assert again.checks == PROFILE.checks
    assert get_profile(engine, PROFILE.key) == again


def test_processes_that_measure_at_once_lose_nothing(engine: Engine) -> None:
    results([aside(put_profile, engine, part) for part in parts(PROFILE, 1)])
    found = get_profile(engine, PROFILE.key)
    assert found is not None
    assert found.times == PROFILE.times


def test_the_profile_that_was_last_added_to_comes_first(engine: Engine) -> None:
    other, older = replace(PROFILE, device="another"), replace(PROFILE, driver="older")
    for profile in (older, other, PROFILE):
        put_profile(engine, profile)
    assert [profile.key for profile in list_profiles(engine)] == [PROFILE.key, other.key, older.key]
    put_profile(engine, older)
    assert list_profiles(engine)[0].key == older.key


def test_a_request_is_counted_by_what_is_stored_when_it_is_made(engine: Engine) -> None:
    asked = {"model": "m", "budgets": {"latency_ms": 1}, "latency": {"profile": DEVICE, "tokens": 16}}
    request = SearchRequest.model_validate(asked)
    with pytest.raises(InvalidRequest, match="there is none yet"):
        latency_of(engine, request)
    put_profile(engine, PROFILE)
    found = latency_of(engine, request)
    assert found is not None
    assert (found.profile, found.tokens) == (PROFILE, 16)
