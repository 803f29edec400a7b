"""The permalink of a point: what its HTML says."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from api.frontier import Frontier
from api.pages.difference import changes, difference, neighbours, ranges
from api.pages.exports import offers
from api.pages.point import cards
from api.pages.spending import point_spending
from api.pages.strip import allocation_strip, cell_texts
from db.candidates import candidate, candidates
from db.latency import put_profile
from db.models import put_model
from db.searches import get_search
from search.exports import EXPORTS
from tests.api import examples
from tests.search.profiles import DEVICE, profile_of

MOST_BYTES = 500_000


def found(engine: Engine, search_id: int) -> Frontier:
    return Frontier(get_search(engine, search_id), tuple(candidates(engine, search_id)))


def text_of(page: str) -> str:
    """What a reader sees, without tags and runs of blanks."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", page)).split())


@pytest.fixture
def frontier(engine: Engine) -> Frontier:
    return found(engine, examples.finished_search(engine))


def test_a_point_stands_against_full_precision_and_the_best_uniform_one(client: TestClient, frontier: Frontier) -> None:
    best = frontier.best
    assert best
    comparison = frontier.compare(best)
    assert comparison
    assert comparison.ratio
    page = text_of(client.get(f"/searches/1/points/{best.number}").text)
    assert f"{comparison.ratio:.1f}× less than w4a16g64" in page
    full = 2 * examples.encoder().parameters
    assert f"{full / best.costs['size_bytes']:.1f}× smaller than 16 bits" in page
    assert f"{full / 1e6:.1f} MB" in page, "the column of full precision"
    assert f"{best.loss:.3g} ± {best.metrics['loss_stderr']:.1g}" in page


def test_the_loss_of_a_point_that_was_not_reported_is_said_to_be_another(frontier: Frontier) -> None:
    searched = frontier.searched[0]
    assert cards(frontier, searched, {})[0].name == "Loss on calibration data"
    predicted = replace(searched, metrics={})
    card = cards(frontier, predicted, {})[0]
    assert card.name == "Predicted loss"
    assert card.note == f"by {min(predicted.predicted)}; not measured"
    running = replace(frontier, search=replace(frontier.search, state="running"))
    assert frontier.best
    assert cards(running, frontier.best, {})[0].name == "Loss on calibration data"


def test_every_layer_has_a_cell_with_its_scheme(client: TestClient, frontier: Frontier) -> None:
    best = frontier.best
    assert best
    page = client.get(f"/searches/1/points/{best.number}").text
    cells = re.findall(r'<td class="cell bits-(\d)[^"]*" title="(\w+)">([^<]+)</td>', page)
    assert len(cells) == len(best.allocation) == 36
    assert sorted(scheme for _, scheme, _ in cells) == sorted(best.allocation.values())
    assert all(scheme.startswith(f"w{bits}") and text == bits for bits, scheme, text in cells)


def test_cells_tell_apart_the_schemes_that_are_used() -> None:
    assert cell_texts(["w4a16g64", "w8a16g64"]) == {"w4a16g64": "4", "w8a16g64": "8"}
    assert cell_texts(["w4a16g64", "w8a8"]) == {"w4a16g64": "4", "w8a8": "8·8"}
    assert cell_texts(["w4a16g64", "w4a16g128", "w4a16"]) == {
        "w4a16g64": "4/64",
        "w4a16g128": "4/128",
        "w4a16": "4/ch",
    }
    assert cell_texts(["w4a16g64", "w4a16g64asym"]) == {"w4a16g64": "w4a16g64", "w4a16g64asym": "w4a16g64asym"}


def test_what_a_neighbour_would_change_costs_and_buys_what_the_points_say(
    client: TestClient, engine: Engine, frontier: Frontier
) -> None:
    point = frontier.points[-2]
    beside = {one.place: one.point for one in neighbours(frontier, point)}
    assert [beside["cheaper"].number, beside["better"].number] == [
        frontier.points[-3].number,
        frontier.points[-1].number,
    ]
    assert beside["uniform"].source == "uniform"
    assert frontier.search.summary
    layers = frontier.search.summary["layers"]
    for neighbour in neighbours(frontier, point):
        other = candidate(engine, 1, neighbour.point.number)
        assert other
        told = difference(point, neighbour, other.allocation, layers)
        differing = [name for name in point.allocation if point.allocation[name] != other.allocation[name]]
        assert told.layers == len(differing)
        strip = allocation_strip(point, layers, {neighbour.place: other.allocation})
        assert strip.grid
        marked = [cell.layer for _, row in strip.grid.rows for cell in row if cell and cell.differs]
        assert sorted(marked) == sorted(differing)
        assert point.loss
        assert other.loss
        sooner = told.amounts[0]
        assert sooner.endswith("less") == (other.loss < point.loss)
    page = text_of(client.get(f"/searches/1/points/{point.number}").text)
    assert f"Cheaper: point {beside['cheaper'].number}" in page
    assert f"Layers that change with point {beside['better'].number}" in page


def test_layers_that_change_are_told_by_kind_and_block() -> None:
    def layer(block: int | None, kind: str) -> dict[str, Any]:
        name = kind if block is None else f"model.layers.{block}.{kind}"
        return {"name": name, "block": None if block is None else f"model.layers.{block}"}

    layers = [layer(block, kind) for block in range(6) for kind in ("q", "down")] + [layer(None, "lm_head")]
    before = {one["name"]: "w4a16" for one in layers}
    moved = ["model.layers.0.down", "model.layers.1.down", "model.layers.2.down", "model.layers.5.down", "lm_head"]
    after = before | dict.fromkeys(moved, "w8a16") | {"model.layers.3.q": "w2a16"}
    told = [(one.before, one.after, one.layers, one.where) for one in changes(before, after, layers)]
    assert told == [
        ("w4a16", "w8a16", 5, ["down of blocks 0–2, 5", "lm_head"]),
        ("w4a16", "w2a16", 1, ["q of block 3"]),
    ]
    assert ranges(["10", "9", "1"]) == "1, 9–10"
    assert ranges(["a", "b"]) == "a, b"


def test_the_bytes_add_up_to_the_size_of_the_point(engine: Engine, client: TestClient, frontier: Frontier) -> None:
    best = frontier.best
    assert best
    spent = point_spending(engine, frontier.search, best)
    assert spent
    for rows in (spent.by_kind, spent.by_block):
        assert sum(row.size.share for row in rows) == pytest.approx(1)
    assert spent.size == f"{best.costs['size_bytes'] / 1e6:.1f} MB"
    assert len(spent.layers) == 38, "two of them not searched"
    assert spent.time is None
    page = text_of(client.get(f"/searches/1/points/{best.number}").text)
    assert "Where the bytes go" in page
    assert f"{spent.size} in all" in page
    assert "encoder.layer.3" in page


def test_microseconds_are_told_where_a_profile_counted_them(client: TestClient, engine: Engine) -> None:
    schemes = ["w4a16g64", "w5a16g64", "w6a16g64", "w8a16g64"]
    put_profile(engine, profile_of(examples.encoder(), schemes, (16,)))
    asked = {"latency": {"profile": DEVICE, "tokens": 16}, "budgets": {"avg_bits": 5.25, "latency_ms": 50}}
    frontier = found(engine, examples.finished_search(engine, **asked))
    best = frontier.best
    assert best
    spent = point_spending(engine, frontier.search, best)
    assert spent
    assert spent.time == f"{best.costs['latency_us'] / 1e3:.2f} ms"
    assert sum(row.time.share for row in spent.by_kind if row.time) == pytest.approx(1)
    page = text_of(client.get(f"/searches/1/points/{best.number}").text)
    assert "Where the bytes and microseconds go" in page
    assert "faster than 16 bits" in page


def test_every_export_is_offered_with_its_command_or_refused_with_a_reason(client: TestClient, engine: Engine) -> None:
    # Nothing ties what vLLM fuses, so that vLLM cannot carry most points.
    frontier = found(engine, examples.finished_search(engine, target="generic"))
    point = frontier.points[-1]
    path = f"/searches/1/points/{point.number}"
    page = client.get(path).text
    whole = candidate(engine, 1, point.number)
    assert whole
    listed = offers(engine, frontier.search, whole)
    assert {offer.export.name for offer in listed} == set(EXPORTS)
    assert {offer.export.name for offer in listed if offer.refused} >= {"vllm"}
    for offer in listed:
        link = f"/v1{path}/config?format={offer.export.name}"
        assert offer.export.carries.replace("`", "") in html.unescape(page)
        answer = client.get(link)
        if offer.refused:
            assert answer.status_code == 422
            assert f'href="{link}"' not in page
            assert answer.json()["detail"] in html.unescape(page)
        else:
            assert answer.status_code == 200
            assert f'href="{link}"' in page
            assert offer.command in html.unescape(page)


def test_the_targets_own_format_comes_first(client: TestClient, frontier: Frontier) -> None:
    best = frontier.best
    assert best
    page = client.get(f"/searches/1/points/{best.number}").text
    assert re.findall(r"<h3><code>([^<]+)</code>", page)[0] == "vllm"
    assert f"bitfrontier apply 1 --point {best.number} --output" in page


def test_a_point_whose_model_is_another_now_says_so_and_offers_nothing(
    client: TestClient, engine: Engine, frontier: Frontier
) -> None:
    put_model(engine, examples.MODEL, "somewhere", replace(examples.encoder(), digest="e" * 64))
    answer = client.get(f"/searches/1/points/{frontier.points[0].number}")
    assert answer.status_code == 200
    assert "is no longer registered as it was searched" in answer.text
    assert "Where the bytes go" not in answer.text
    assert "/config?format=" not in answer.text
    assert "Bits of each layer" in answer.text


def test_rejected_and_unmeasured_points_have_honest_pages(
    client: TestClient, engine: Engine, frontier: Frontier
) -> None:
    searched = text_of(client.get(f"/searches/1/points/{frontier.searched[0].number}").text)
    assert "Loss on calibration data" in searched
    assert "not measured on held-out data" in searched
    unmeasured = next(point for point in frontier.predicted if not point.metrics)
    page = text_of(client.get(f"/searches/1/points/{unmeasured.number}").text)
    assert "Predicted loss" in page
    assert "Not measured: what is shown is predicted." in page
    assert "± " not in page.partition("Bits of each layer")[0]
    assert "not measured" in page.partition("Another point instead")[2], "there is no loss to compare"


def test_a_point_of_a_thousand_layers_is_a_small_page(client: TestClient, engine: Engine) -> None:
    frontier = found(engine, examples.deep_search(engine, 167))
    best = frontier.best
    assert best
    answer = client.get(f"/searches/1/points/{best.number}")
    assert answer.text.count('<td class="cell ') == 1002
    assert len(answer.content) < MOST_BYTES
