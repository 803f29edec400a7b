"""What the service adds to a search: the wait for its first stage, and the time after its last measurement."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
from sqlalchemy import text

from benchmarks.load.service import Service
from db.models import put_model

WARM_UP = 1
REQUEST = {
    "model": "tiny",
    "target": "generic",
    "sensitivity": ["fisher"],
    "budgets": {"avg_bits": 5.0},
    "optimizer": {"points": 6, "evaluations": 12},
}

TIMES = text("""
    SELECT extract(epoch FROM (SELECT min(created_at) FROM events WHERE search_id = :search AND kind = 'stage')),
           extract(epoch FROM (SELECT max(created_at) FROM results WHERE search_id = :search)),
           extract(epoch FROM (SELECT max(created_at) FROM events WHERE search_id = :search AND kind = 'state'))
""")
"""The first stage, the last result that was stored, the last state: Unix seconds."""


def overheads(service: Service, model: Path, searches: int) -> list[tuple[float, float]]:
    """Seconds from POST to the first stage, and from the last stored result to `succeeded`, of searches one after the
    other, each on data of its own. A first one, which loads the model, does not count."""
    put_model(service.engine, "tiny", str(model), None)
    headers = {"Authorization": f"Bearer {service.keys[0]}"}
    with service.worker(), httpx.Client(base_url=service.url, headers=headers, timeout=60, trust_env=False) as http:
        return [_one(service, http, seed) for seed in range(WARM_UP + searches)][WARM_UP:]


def _one(service: Service, http: httpx.Client, seed: int) -> tuple[float, float]:
    calibration = {"samples": 8, "sequence_length": 64, "seed": seed}
    posted = time.time()
    search = http.post("/v1/searches", json=REQUEST | {"calibration": calibration}).raise_for_status().json()["id"]
    while (state := http.get(f"/v1/searches/{search}").json()["state"]) in ("queued", "running"):
        time.sleep(0.2)
    assert state == "succeeded", http.get(f"/v1/searches/{search}").text
    # The database's clock is this machine's.
    with service.engine.connect() as connection:
        began, measured, ended = connection.execute(TIMES, {"search": search}).one()
    # An idle worker takes up its next search only after this.
    time.sleep(0.5)
    return float(began) - posted, float(ended) - float(measured)
