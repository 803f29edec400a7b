"""Searches beside each other."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from math import exp, log
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from api.frontier import Frontier
from api.pages.comparison import Comparison, cautions, shared_axes
from db.candidates import candidates
from db.keys import create_key
from db.searches import create_search, get_search
from search.request import SearchRequest
from tests.api import examples


def frontier(engine: Engine, search_id: int) -> Frontier:
    return Frontier(get_search(engine, search_id), tuple(candidates(engine, search_id, allocations=False)))


def figure(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="comparison-data">(.*?)</script>', page, re.DOTALL)
    assert found
    document: dict[str, Any] = json.loads(found[1])
    return document


def text_of(page: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


def test_searches_are_drawn_and_listed_side_by_side(client: TestClient, engine: Engine) -> None:
    first = examples.finished_search(engine)
    second = examples.finished_search(engine, space=examples.ACTIVATIONS)
    page = client.get("/compare", params={"searches": f"{second},{first}"}).text
    traces = figure(page)["data"]
    lines = [trace for trace in traces if trace["mode"] == "lines+markers"]
    assert [trace["name"] for trace in lines] == ["2 · all-minilm-l6-v2", "1 · all-minilm-l6-v2"]
    assert len({trace["marker"]["symbol"] for trace in lines}) == len({trace["line"]["dash"] for trace in lines}) == 2
    for trace, search_id in zip(lines, (second, first), strict=True):
        line = frontier(engine, search_id).line("avg_bits")
        assert trace["customdata"] == [f"/searches/{search_id}/points/{point.number}" for point in line]
        assert trace["y"] == [point.loss for point in line]
    assert client.get(traces[0]["customdata"][0]).status_code == 200
    best = frontier(engine, first).best
    assert best
    assert f'href="/searches/{first}/points/{best.number}"' in page
    by_size = client.get("/compare", params={"searches": "1,2", "axis": "size_bytes"}).text
    assert figure(by_size)["layout"]["xaxis"]["title"]["text"] == "Model size, MB"
    assert '<a href="/compare?searches=1,2&amp;axis=size_bytes" aria-current="true">' in by_size


def test_hypervolumes_are_measured_from_the_corner_that_is_stated(client: TestClient, engine: Engine) -> None:
    shown = [frontier(engine, examples.finished_search(engine, space=space)) for space in (
        examples.REQUEST["space"], examples.ACTIVATIONS)]  # fmt: skip
    comparison = Comparison(shown, "avg_bits")
    corner = comparison.reference
    assert corner
    points = [point for line in comparison.lines for point in line]
    assert corner.cost == max(point.costs["avg_bits"] for point in points)
    assert corner.loss == max(
        point.metrics["loss"] for one in shown for point in (*one.baselines, *one.line("avg_bits"))
    )
    width = corner.cost - corner.least
    for row, line in zip(comparison.rows, comparison.lines, strict=True):
        # A staircase: each loss holds from its cost to the next.
        ends = [*(point.costs["avg_bits"] for point in line[1:]), corner.cost]
        steps = [
            (end - point.costs["avg_bits"]) * log(corner.loss / point.metrics["loss"])
            for point, end in zip(line, ends, strict=True)
        ]
        assert row.hypervolume == pytest.approx(sum(steps) / width)
        assert 0 < row.hypervolume < log(corner.loss / min(point.metrics["loss"] for point in points))
    page = text_of(client.get("/compare?searches=1,2").text)
    assert f"loss {corner.loss:.3g} at {corner.cost:.2f} bits" in page
    for row in comparison.rows:
        assert f"{row.hypervolume:.2f}" in page
    assert exp(0.69) == pytest.approx(2, rel=0.01), "as the page explains"


def test_what_cannot_be_compared_is_said(client: TestClient, engine: Engine) -> None:
    finished = examples.finished_search(engine)
    running, _ = examples.claimed_search(engine)
    queued = [examples.queued_search(engine) for _ in range(3)]
    page = text_of(client.get("/compare", params={"searches": f"{finished},{running},77,x"}).text)
    assert f"Search {running} is running: nothing of it is measured, and it is not drawn." in page
    assert "There is no search 77 that you may see." in page
    assert "“x” is not the number of a search." in page
    assert "Hypervolume" in page, "what can be compared is"
    numbers = [finished, running, *queued]
    many = text_of(client.get("/compare", params={"searches": ",".join(map(str, numbers))}).text)
    assert f"At most 4 searches are compared; left out: {queued[-1]}." in many
    none = text_of(client.get("/compare", params={"searches": str(running)}).text)
    assert "There is nothing to draw yet." in none
    assert f"There is no search {'9' * 18} that" in text_of(client.get(f"/compare?searches={'9' * 18}").text)
    assert f"“{'9' * 40}” is not the number" in text_of(client.get(f"/compare?searches={'9' * 300}").text)
    long = ",".join([*(f"{number}z" for number in range(99)), str(finished), str(running)])
    crowded = text_of(client.get("/compare", params={"searches": long}).text)
    assert "Hypervolume" in crowded, "a hundred are read"
    assert f"Search {running} is running" not in crowded, "and no more"
    assert client.get("/compare?searches=1&axis=colour", headers={"Accept": "text/html"}).status_code == 422


def test_losses_of_other_models_are_called_incomparable(client: TestClient, engine: Engine) -> None:
    same = [frontier(engine, examples.finished_search(engine)) for _ in range(2)]
    assert cautions(same) == []
    deep = frontier(engine, examples.deep_search(engine, 7, model="deep"))
    (told,) = cautions([same[0], deep])
    assert told.startswith("These searches are of different models")
    assert told in text_of(client.get("/compare?searches=1,3").text)
    assert shared_axes([same[0], deep]) == ["avg_bits", "size_bytes", "bitops"]


def test_bits_of_other_layers_of_one_model_are_called_so(engine: Engine) -> None:
    one, other = (frontier(engine, examples.finished_search(engine)) for _ in range(2))
    summary = other.search.summary or {}
    fewer = replace(other, search=replace(other.search, summary=summary | {"layers": summary["layers"][1:]}))
    (told,) = cautions([one, fewer])
    assert told == (
        "These searches chose the bits of different layers (search 1: 36 for vllm, search 2: 35 for vllm): "
        "their bits per weight are of different weights, so compare them by another cost."
    )


def test_the_form_chooses_by_ticks_and_one_search_may_stand_alone(client: TestClient, engine: Engine) -> None:
    for _ in range(2):
        examples.finished_search(engine)
    page = client.get("/compare").text
    assert page.count('type="checkbox" name="searches"') == 2
    assert "Choose up to 4 searches" in page
    ticked = client.get("/compare", params=[("searches", "1"), ("searches", "2"), ("searches", "1")]).text
    assert len(figure(ticked)["data"]) == 4, "a line and the baselines of each"
    assert ticked.count(" checked>") == 2
    assert "Hypervolume" in client.get("/compare?searches=1").text


def test_without_a_search_there_is_a_page(client: TestClient) -> None:
    assert "There is no search yet." in client.get("/compare").text


def test_searches_of_other_keys_are_not_found(keyed: TestClient, engine: Engine) -> None:
    key, token = create_key(engine, "ada", {"read", "write"})
    create_search(engine, SearchRequest.model_validate(examples.REQUEST), key=key)
    other, _ = create_key(engine, "bob", {"write"})
    hidden, _ = create_search(engine, SearchRequest.model_validate(examples.REQUEST | {"model": "secret"}), key=other)
    page = keyed.get(
        f"/compare?searches=1,{hidden.id}", headers={"Authorization": f"Bearer {token}", "Accept": "text/html"}
    )
    assert page.status_code == 200
    assert f"There is no search {hidden.id} that you may see." in page.text
    assert "secret" not in page.text
