"""Latency profiles: what is known of devices' times, and the files to take it elsewhere."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Response

from api.catalog import LatencyProfileDocument, LatencyProfiles
from api.dependencies import Database
from api.problems import READ, responses
from api.strict import StrictRoute
from db.latency import get_profile, list_profiles
from search.errors import NotFound
from search.latency_profile import write_profile

router = APIRouter(prefix="/v1/latency-profiles", tags=["catalog"], route_class=StrictRoute)

Key = Annotated[str, Path(pattern=r"^[0-9a-f]{16}$", description="`key` of a profile.", examples=["0123456789abcdef"])]


@router.get("", responses=responses(*READ), summary="Latency profiles")
def latency_profiles(engine: Database) -> LatencyProfiles:
    """The devices whose latency a search may count and bound."""
    return LatencyProfiles(profiles=[LatencyProfileDocument.of(profile) for profile in list_profiles(engine)])


@router.get(
    "/{key}",
    responses=responses(*READ, 404) | {200: {"content": {"application/json": {"schema": {"type": "object"}}}}},
    response_class=Response,
    summary="A latency profile as a file",
)
def latency_profile(engine: Database, key: Key) -> Any:
    """All its times, as `bitfrontier latency import` reads them."""
    profile = get_profile(engine, key)
    if profile is None:
        raise NotFound(f"there is no latency profile {key}", field="key", value=key)
    headers = {"Content-Disposition": f'attachment; filename="latency-{key}.json"'}
    return Response(write_profile(profile), media_type="application/json", headers=headers)
