"""Metrics for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import choose_encoder

from api.problems import responses
from api.telemetry import Telemetry

router = APIRouter(tags=["health"])


@router.get(
    "/metrics",
    responses=responses() | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    response_class=Response,
    summary="Metrics for Prometheus",
)
async def scrape(request: Request) -> Response:
    """Searches by state, queue age, stage durations, results computed and reused, workers, GPUs; requests and streams
    of this process."""
    found: Telemetry = request.app.state.telemetry
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(await found.scrape(encode), headers={"Content-Type": content_type, "Cache-Control": "no-store"})
