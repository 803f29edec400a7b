from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from api.frontier import Frontier
from api.pages.charts import frontier_figures
from api.pages.strip import allocation_strip
from api.pages.views import best_verdict, verdict
from db.candidates import candidates
from db.events import add_event
from db.queue import progress, succeed
from db.searches import get_search
from tests.api import examples


@pytest.fixture
def frontier(engine: Engine) -> Frontier:
    search_id = examples.finished_search(engine)
    return Frontier(get_search(engine, search_id), tuple(candidates(engine, search_id)))


class Links(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found |= {value for name, value in attrs if name in ("href", "src") and value}


def test_every_link_from_the_front_page_on_leads_somewhere(client: TestClient, frontier: Frontier) -> None:
    seen, waiting = set(), ["/"]
    while waiting:
        path = waiting.pop()
        if path in seen or path.startswith("#"):
            continue
        seen.add(path)
        assert path.startswith("/"), f"{path}: nothing is loaded from elsewhere"
        answer = client.get(path)
        assert answer.status_code == 200, (path, answer.text[:300])
        if answer.headers["content-type"].startswith("text/html") and "attachment" not in str(answer.headers):
            waiting += Links(answer.text).found
    assert {f"/searches/1/points/{point.number}" for point in frontier.measured} <= seen


def test_figures_show_the_points_of_each_axis(frontier: Frontier) -> None:
    figures = frontier_figures(frontier)
    assert list(figures) == ["avg_bits", "size_bytes", "bitops"]
    for resource, figure in figures.items():
        by_role = {trace["meta"]: trace for trace in figure["data"]}
        drawn = [n for role, trace in by_role.items() if role != "best" for n in trace["customdata"]]
        assert set(drawn) == {point.number for point in frontier.measured}
        assert frontier.best
        assert by_role["best"]["customdata"] == [frontier.best.number]
        xs = by_role["frontier"]["x"]
        assert xs == sorted(xs)
        limits = [shape["x0"] for shape in figure["layout"]["shapes"]]
        assert limits == {"avg_bits": [5.25], "size_bytes": [40.0], "bitops": []}[resource]


def test_loss_of_zero_has_a_place_on_the_log_axis(frontier: Frontier) -> None:
    first, *others = frontier.candidates
    lossless = replace(first, metrics={"loss": 0.0})
    figure = frontier_figures(replace(frontier, candidates=(lossless, *others)))["avg_bits"]
    assert min(y for trace in figure["data"] for y in trace["y"]) > 0
    json.dumps(figure, allow_nan=False)


def test_verdicts(frontier: Frontier) -> None:
    assert frontier.best
    assert re.fullmatch(
        r"\d\.\d+× less loss than uniform w5a16g64, the best uniform configuration that fits\.", best_verdict(frontier)
    )
    assert "less loss than uniform w4a16g64" in verdict(frontier, frontier.best)
    assert verdict(frontier, frontier.baselines[0]) == "A uniform configuration: every searched layer at w4a16g64."
    assert "Not measured" in verdict(frontier, frontier.predicted[0])
    worse = replace(frontier.best, metrics={"loss": 2 * frontier.baselines[0].metrics["loss"]})
    assert verdict(frontier, worse).startswith("2.0× more loss than uniform w4a16g64")
    cheapest = replace(frontier.best, costs=frontier.best.costs | {"avg_bits": 2.0})
    assert verdict(frontier, cheapest) == "Fewer bits than every uniform configuration."


def test_strip_aligns_blocks_and_counts_every_layer(frontier: Frontier) -> None:
    assert frontier.best
    assert frontier.search.summary
    layers = frontier.search.summary["layers"]
    embedding = {"name": "embeddings", "block": None, "rows": 10, "columns": 10}
    head = embedding | {"name": "head"}
    point = replace(frontier.best, allocation=frontier.best.allocation | {"embeddings": "w8a16", "head": "w8a8"})
    strip = allocation_strip(point, [embedding, *layers, head])
    assert strip.grid
    assert len(strip.grid.blocks) == 6
    assert next(kind for kind, _ in strip.grid.rows) == "attention.self.query"
    cells = [cell for _, row in strip.grid.rows for cell in row if cell]
    assert len(cells) == 36
    assert [cell.text for cell in strip.before + strip.after] == ["8", "8·8"]
    assert sum(share.fraction for share in strip.shares) == pytest.approx(1)
    assert sum(share.layers for share in strip.shares) == 38


def test_blocks_of_differing_make_become_a_plain_strip(frontier: Frontier) -> None:
    assert frontier.best
    layers = [
        {"name": f"stage.{n}.conv{n}", "block": f"stage.{n}", "rows": 8, "columns": 8, "kind": "conv"} for n in range(9)
    ]
    point = replace(frontier.best, allocation={layer["name"]: "w4a16" for layer in layers})
    strip = allocation_strip(point, layers)
    assert strip.grid is None
    assert [cell.layer for cell in strip.before] == [layer["name"] for layer in layers]


def test_running_and_failed_searches_have_pages(client: TestClient, engine: Engine) -> None:
    refused = {"type": "x", "title": "Too little <data>", "status": 422, "detail": "3 < 64", "field": "calibration"}
    failed = examples.failed_search(engine, refused)
    page = client.get(f"/searches/{failed}").text
    assert "Too little &lt;data&gt;" in page
    running, held = examples.claimed_search(engine)
    progress(engine, held, "sensitivity", 3, 36)
    add_event(engine, running, "notice", {"message": "the pooler <is> skipped"})
    page = client.get(f"/searches/{running}").text
    assert 'data-live="true"' in page
    assert "sensitivity: 3 of 36" in page
    assert "the pooler &lt;is&gt; skipped" in page
    assert "3 < 64" not in client.get("/").text


def test_a_search_too_small_for_a_rank_correlation_has_a_page(client: TestClient, engine: Engine) -> None:
    search, held = examples.claimed_search(engine)
    succeed(engine, held, {"agreement": {"kl": {"spearman": None, "points": 1}}})
    page = client.get(f"/searches/{search}")
    assert page.status_code == 200
    assert "too few points" in page.text


def test_scripts_are_cached_and_nothing_else_is_served(client: TestClient) -> None:
    assert "immutable" in client.get("/static/plotly.min.js").headers["cache-control"]
    for name in ("..%2Fapp.py", "mark.txt", "bitfrontier.css%00"):
        assert client.get(f"/static/{name}").status_code == 404
