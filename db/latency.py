"""Latency profiles: one row for each device, driver, backend and source, which grows as more is measured."""

from __future__ import annotations

from sqlalchemy import Engine, func, select, update
from sqlalchemy.dialects.postgresql import insert

from db.tables import LatencyProfileRow
from search.latency import Latency, chosen
from search.latency_profile import LatencyProfile, from_json, to_json
from search.request import CostRequest


def put_profile(engine: Engine, profile: LatencyProfile) -> LatencyProfile:
    """Add what was measured to what is stored under its key; what is then stored."""
    row = insert(LatencyProfileRow).values(key=profile.key, device=profile.device, profile=to_json(profile))
    stored = select(LatencyProfileRow.profile).where(LatencyProfileRow.key == profile.key).with_for_update()
    with engine.begin() as connection:
        if connection.execute(row.on_conflict_do_nothing().returning(LatencyProfileRow.key)).first():
            return profile
        # Locked until the end: who else adds to it waits, and loses nothing.
        merged = from_json(connection.execute(stored).scalar_one()).with_newer(profile)
        newer = update(LatencyProfileRow).where(LatencyProfileRow.key == profile.key)
        connection.execute(newer.values(profile=to_json(merged), created_at=func.now()))
    return merged


def get_profile(engine: Engine, key: str) -> LatencyProfile | None:
    """The profile stored under a key."""
    with engine.connect() as connection:
        found = connection.execute(
            select(LatencyProfileRow.profile).where(LatencyProfileRow.key == key)
        ).scalar_one_or_none()
    return None if found is None else from_json(found)


def list_profiles(engine: Engine) -> list[LatencyProfile]:
    """All profiles, the one that was last added to first."""
    newest = select(LatencyProfileRow.profile).order_by(LatencyProfileRow.created_at.desc(), LatencyProfileRow.key)
    with engine.connect() as connection:
        return [from_json(profile) for profile in connection.execute(newest).scalars()]


def latency_of(engine: Engine, request: CostRequest) -> Latency | None:
    """By what a request counts time; of a device with several profiles, by the one that was last added to.

    Raises InvalidRequest as `search.latency.chosen` does.
    """
    return chosen(request, list_profiles(engine)) if request.counts_latency else None
