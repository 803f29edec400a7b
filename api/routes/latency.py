"""Latency profiles: what is known of devices' times, and the files to take it elsewhere."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Response
from pydantic import BaseModel, ConfigDict, Field

from api.dependencies import Database
from api.problems import responses
from db.latency import get_profile, list_profiles
from search.errors import NotFound
from search.latency_profile import LatencyProfile, write_profile

router = APIRouter(prefix="/v1/latency-profiles", tags=["catalog"])

Key = Annotated[str, Path(pattern=r"^[0-9a-f]{16}$", description="`key` of a profile.", examples=["0123456789abcdef"])]


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class LatencyProfileDocument(_Document):
    """What was measured on a device, without the times."""

    device: str = Field(examples=["NVIDIA H100 80GB HBM3"])
    """What a search names it by in `latency.profile`."""
    key: str
    """Names it among several of a device; a search may name it by this, too."""
    driver: str
    backend: str
    """The kernels that multiplied."""
    sources: str
    """Digest of their sources."""
    dtype: str
    """Of the tokens."""
    created: str
    """When it was last added to."""
    products: int
    """How many times it has, each of a weight's shape, a number of tokens and a scheme."""
    forwards: int
    """How many forward passes of whole models it has beside them."""
    tokens: list[int]
    """The numbers of tokens that were multiplied at once; an image counts as many as it has places."""
    schemes: list[str]

    @classmethod
    def of(cls, profile: LatencyProfile) -> LatencyProfileDocument:
        """The document of a profile."""
        return cls(
            device=profile.device,
            key=profile.key,
            driver=profile.driver,
            backend=profile.backend,
            sources=profile.sources,
            dtype=profile.dtype,
            created=profile.created,
            products=len(profile.times),
            forwards=len(profile.checks),
            tokens=profile.tokens,
            schemes=[str(scheme) for scheme in profile.schemes],
        )


class LatencyProfiles(_Document):
    """The stored profiles; of a device that has several, a search takes the first."""

    profiles: list[LatencyProfileDocument]


@router.get("", responses=responses(), summary="Latency profiles")
def latency_profiles(engine: Database) -> LatencyProfiles:
    """The devices whose latency a search may count and bound."""
    return LatencyProfiles(profiles=[LatencyProfileDocument.of(profile) for profile in list_profiles(engine)])


@router.get(
    "/{key}",
    responses=responses(404) | {200: {"content": {"application/json": {"schema": {"type": "object"}}}}},
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
