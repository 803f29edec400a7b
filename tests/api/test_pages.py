from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from math import log

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from api.frontier import Frontier
from api.pages.charts import ROLES, chart_document
from api.pages.point import price_sentences, split_rows
from api.pages.strip import allocation_strip
from api.pages.views import best_verdict, verdict
from api.resources import RESOURCES
from db.candidates import candidates
from db.events import tell
from db.queue import claim, progress, release, succeed
from db.searches import get_search
from search.candidate import Candidate
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


def test_the_chart_has_every_measured_point_on_every_axis(frontier: Frontier, client: TestClient) -> None:
    document = client.get("/searches/1/chart.json").json()
    assert document == chart_document(frontier)
    points = document["points"]
    assert list(document["x"]) == ["avg_bits", "size_bytes", "bitops"]
    assert list(document["y"]) == ["loss"]
    drawn = {point.number for point in (*frontier.measured, *frontier.searched)}
    assert set(points["number"]) == drawn
    assert {len(column) for column in points.values()} == {len(drawn)}
    searched = [n for n, role in zip(points["number"], points["role"], strict=True) if ROLES[role] == "searched"]
    assert searched == [point.number for point in frontier.searched]
    assert frontier.best
    assert document["best"] == frontier.best.number
    for name, lines in document["lines"].items():
        assert [points["number"][row] for row in lines["loss"]] == [point.number for point in frontier.line(name)]
    budgets = {name: axis.get("budget") for name, axis in document["x"].items()}
    assert budgets == {"avg_bits": 5.25, "size_bytes": 40.0, "bitops": None}
    best = points["number"].index(document["best"])
    assert points["size_bytes"][best] == pytest.approx(frontier.best.costs["size_bytes"] / 1e6, rel=1e-4)


def test_perplexity_and_accuracy_are_axes_where_they_were_measured(frontier: Frontier) -> None:
    def measured(point: Candidate) -> Candidate:
        if point.loss is None:
            return point
        return replace(point, metrics=point.metrics | {"perplexity": 20 + point.loss, "accuracy": 0.9 - point.loss})

    summary = (frontier.search.summary or {}) | {"full_precision": {"perplexity": 20.0, "accuracy": 0.9}}
    search = replace(frontier.search, summary=summary)
    document = chart_document(Frontier(search, tuple(map(measured, frontier.candidates))))
    assert list(document["y"]) == ["loss", "perplexity", "accuracy"]
    assert document["y"]["accuracy"]["full"] == 90.0
    lines = document["lines"]["avg_bits"]
    assert lines["perplexity"] == lines["accuracy"] == lines["loss"], "most accuracy, least perplexity"
    unreported = document["points"]["number"].index(frontier.searched[0].number)
    assert document["points"]["accuracy"][unreported] is None


def test_reference_lines_are_in_the_unit_that_is_shown(frontier: Frontier) -> None:
    reference = chart_document(frontier)["reference"]
    assert reference["axis"] == "avg_bits"
    assert len(reference["levels"]) == len(reference["lower_bound"]) == len(reference["rate_distortion"])
    summary = frontier.search.summary or {}
    none = summary | {"reference": summary["reference"] | {"rate_distortion": None}}
    document = chart_document(replace(frontier, search=replace(frontier.search, summary=none)))
    assert "rate_distortion" not in document["reference"]


def test_the_axis_says_which_data_the_loss_is_of(frontier: Frontier) -> None:
    def title(state: str) -> str:
        search = replace(frontier.search, state=state)
        return str(chart_document(replace(frontier, search=search))["y"]["loss"]["title"])

    assert title("succeeded") == "Loss against full precision"
    assert title("running") == "Loss against full precision, on calibration data"


def test_loss_of_zero_has_a_place_on_the_log_axis(frontier: Frontier) -> None:
    first, *others = frontier.candidates
    lossless = replace(first, metrics={"loss": 0.0})
    document = chart_document(replace(frontier, candidates=(lossless, *others)))
    assert min(document["points"]["loss"]) > 0
    json.dumps(document, allow_nan=False)


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
    tell(engine, held, "notice", {"message": "the pooler <is> skipped"}, "notice")
    page = client.get(f"/searches/{running}").text
    assert f'hx-sse:connect="/v1/searches/{running}/events?after=' in page
    assert "<strong>Sensitivities</strong>, 3 of 36" in page
    assert "the pooler &lt;is&gt; skipped" in page
    assert "3 < 64" not in client.get("/").text


def test_the_page_and_the_document_say_what_was_reused_and_resumed(client: TestClient, engine: Engine) -> None:
    search, held = examples.claimed_search(engine)
    assert client.get(f"/v1/searches/{search}").json()["work"] is None
    release(engine, held)
    again = claim(engine, "test-worker", examples.LEASE)
    assert again is not None
    succeed(engine, again, {"computed": 21, "reused": 3, "reused_from": [7, 5]})
    document = client.get(f"/v1/searches/{search}").json()
    assert document["work"] == {"computed": 21, "reused": 3, "reused_from": [7, 5]}
    assert document["attempt"] == 2
    page = client.get(f"/searches/{search}").text
    told = '21 results computed, 3 reused from search <a href="/searches/7">7</a> and <a href="/searches/5">5</a>'
    assert told in page
    assert "resumed after a worker stopped" in page


def test_a_search_too_small_for_a_rank_correlation_has_a_page(client: TestClient, engine: Engine) -> None:
    search, held = examples.claimed_search(engine)
    succeed(engine, held, {"agreement": {"kl": {"spearman": None, "points": 1}}})
    assert client.get(f"/searches/{search}").status_code == 200
    assert "too few points" in client.get(f"/searches/{search}/sensitivities").text


def test_scripts_are_cached_and_nothing_else_is_served(client: TestClient) -> None:
    assert "immutable" in client.get("/static/plotly.min.js").headers["cache-control"]
    for name in ("..%2Fapp.py", "mark.txt", "bitfrontier.css%00"):
        assert client.get(f"/static/{name}").status_code == 404


def test_the_list_reads_all_its_candidates_at_once(client: TestClient, engine: Engine, queries: list[str]) -> None:
    for _ in range(2):
        examples.finished_search(engine)
    del queries[:]
    assert client.get("/").status_code == 200
    assert len([query for query in queries if "FROM candidates" in query]) == 1
