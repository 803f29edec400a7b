from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from math import log, log10
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from api.frontier import Frontier
from api.pages.charts import REFERENCES, frontier_figures
from api.pages.strip import allocation_strip
from api.pages.views import best_verdict, price_sentences, split_rows, verdict
from api.resources import RESOURCES
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
        assert set(drawn) == {point.number for point in (*frontier.measured, *frontier.searched)}
        assert by_role["searched"]["customdata"] == [point.number for point in frontier.searched]
        assert frontier.best
        assert by_role["best"]["customdata"] == [frontier.best.number]
        xs = by_role["frontier"]["x"]
        assert xs == sorted(xs)
        limits = [shape["x0"] for shape in figure["layout"]["shapes"]]
        assert limits == {"avg_bits": [5.25], "size_bytes": [40.0], "bitops": []}[resource]


def test_reference_lines_lie_on_the_main_axis_and_wait_where_they_would_stretch_it(frontier: Frontier) -> None:
    def lines(frontier: Frontier) -> tuple[dict[str, Any], dict[str, Any]]:
        figure = frontier_figures(frontier)["avg_bits"]
        return {t["meta"]: t for t in figure["data"] if t["meta"] in REFERENCES}, figure["layout"]

    found, layout = lines(frontier)
    low, high = layout["yaxis"]["range"]
    assert list(found) == ["lower_bound", "rate_distortion"]
    assert [trace["visible"] for trace in found.values()] == [True, True]
    assert all(low <= log10(loss) <= high for trace in found.values() for loss in trace["y"])
    assert not any(trace["meta"] in REFERENCES for trace in frontier_figures(frontier)["size_bytes"]["data"])

    summary = frontier.search.summary or {}
    far = summary | {"reference": summary["reference"] | {"rate_distortion": [1e-12] * 16}}
    found, layout = lines(replace(frontier, search=replace(frontier.search, summary=far)))
    assert found["rate_distortion"]["visible"] == "legendonly"
    assert layout["yaxis"]["range"] == [low, high] or layout["yaxis"]["range"][0] > -6
    assert layout["meta"]["widest"][0] == pytest.approx(-12)

    none = summary | {"reference": summary["reference"] | {"rate_distortion": None, "lower_bound": [0.0] * 16}}
    assert lines(replace(frontier, search=replace(frontier.search, summary=none)))[0] == {}


def test_the_axis_says_which_data_the_loss_is_of(frontier: Frontier) -> None:
    def title(state: str) -> str:
        search = replace(frontier.search, state=state)
        axis = frontier_figures(replace(frontier, search=search))["avg_bits"]["layout"]["yaxis"]
        return str(axis["title"]["text"])

    assert title("succeeded") == "Loss against full precision"
    assert title("running") == "Loss against full precision, on calibration data"


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
    measured_nowhere = replace(frontier.predicted[0], metrics={})
    assert "Not measured" in verdict(frontier, measured_nowhere)
    assert "others did better" in verdict(frontier, frontier.searched[0])
    doubted = replace(frontier.searched[0], metrics={"calibration_loss": 0.1, "acceptance_loss": 0.1})
    assert "did not clearly beat" in verdict(frontier, doubted)
    worse = replace(frontier.best, metrics={"loss": 2 * frontier.baselines[0].metrics["loss"]})
    assert verdict(frontier, worse).startswith("2.0× more loss than uniform w4a16g64")
    cheapest = replace(frontier.best, costs=frontier.best.costs | {"avg_bits": 2.0})
    assert verdict(frontier, cheapest) == "Fewer bits than every uniform configuration."


def test_verdict_where_the_smallest_is_sought(frontier: Frontier) -> None:
    request = frontier.search.request
    sought = request | {"optimizer": request["optimizer"] | {"objective": "size_mb"}}
    smallest = replace(frontier, search=replace(frontier.search, request=sought))
    # As a limit on the loss would: the cheap uniform ones are out.
    candidates = [
        replace(point, fits=point.source != "uniform" or point.label == "uniform w8a16g64")
        for point in frontier.measured
    ]
    smallest = replace(smallest, candidates=tuple(candidates))
    assert smallest.best
    share = 1 - smallest.best.costs["size_bytes"] / smallest.baselines[-1].costs["size_bytes"]
    assert best_verdict(smallest) == (
        f"{100 * share:.0f} % smaller than uniform w8a16g64, the cheapest uniform configuration that fits."
    )


def test_every_split_is_named_with_what_it_is_for(frontier: Frontier, client: TestClient) -> None:
    best = frontier.best
    assert best
    names = [row.name for row in split_rows(frontier, best)]
    assert names == ["Expected", "Calibration data", "Acceptance data", "Held-out data"]
    assert [row.name for row in split_rows(frontier, frontier.searched[0])] == ["Expected", "Calibration data"]
    running = replace(frontier, search=replace(frontier.search, state="running"))
    assert "Held-out data" not in [row.name for row in split_rows(running, best)], "not measured there yet"
    raced = replace(best, metrics={"calibration_loss": 0.1, "calibration_share": 0.25})
    assert "25 %" in split_rows(frontier, raced)[1].purpose
    outside = replace(best, expected={"loss": 1e-9, "low": 1e-10, "high": 1e-8})
    assert split_rows(frontier, outside)[-1].purpose.endswith("outside the expected interval")
    page = client.get(f"/searches/1/points/{best.number}").text
    assert "Expected and measured loss" in page
    assert all(name in page for name in names)


def test_a_point_that_was_only_searched_has_a_page(frontier: Frontier, client: TestClient) -> None:
    page = client.get(f"/searches/1/points/{frontier.searched[0].number}").text
    assert "searched only" in page
    assert "over budget" not in page
    assert "Calibration data" in page
    assert "Held-out data" not in page


def test_prices_are_said_in_words(frontier: Frontier, client: TestClient) -> None:
    """At 2^(−2b), 0.1 bits save 13 %: 2·ln 2 of the loss per bit."""
    assert frontier.best
    exponential = {"avg_bits": 2 * log(2), "size_bytes": 2e-8, "bitops": 0.0}
    point = replace(frontier.best, shadow_prices=exponential, costs={**frontier.best.costs, "size_bytes": 40e6})
    assert price_sentences(point) == [
        "0.1 bits per weight more would save about 13 % of the loss.",
        "1 MB more would save about 2 % of the loss.",
        "1 % more bit operations would save next to nothing.",
    ]
    small = replace(point, costs={**point.costs, "size_bytes": 1e6}, shadow_prices={"size_bytes": 5e-7})
    assert price_sentences(small) == ["1 % more size would save about 0.5 % of the loss."]
    part = replace(point, costs={**point.costs, "avg_bits of *.fc2": 4.0}, shadow_prices={"avg_bits of *.fc2": 1.0})
    assert price_sentences(part) == ["0.1 bits per weight more for *.fc2 would save about 10 % of the loss."]
    assert "more would save about" in client.get(f"/searches/1/points/{frontier.best.number}").text


def test_the_page_says_how_far_to_believe_it(frontier: Frontier, client: TestClient) -> None:
    page = client.get("/searches/1").text
    assert "33.5 spent, of 64 at most" in page
    assert "9 of 12 finalists" in page
    assert "8 of 9 reported losses lie within the 90 % interval expected" in page
    assert page.count('<span class="tag tag-knee"') == 1


def test_small_amounts_keep_their_digits() -> None:
    size, operations = RESOURCES["size_bytes"], RESOURCES["bitops"]
    assert [size.text(stored) for stored in (31e6, 1e6, 0.0348e6)] == ["31.0 MB", "1.0 MB", "0.035 MB"]
    assert [operations.number(stored) for stored in (0.87e9, 0.0512e9)] == ["0.87", "0.0512"]


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
