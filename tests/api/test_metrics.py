"""What people are told of metrics: words, reports, heat maps."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from api.metrics import announcement, passes_number, rough_time, value_text
from api.pages import heatmap
from api.pages.metrics import chosen_sensitivities, completeness, metric_reports
from api.sensitivities import read_sensitivities
from db.candidates import candidates
from db.queue import succeed
from db.searches import Search, get_search
from tests.api import examples


@pytest.fixture
def search(engine: Engine) -> Search:
    return get_search(engine, examples.finished_search(engine))


class Text(HTMLParser):
    """The words of a page, tags left out."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.words += data.split()


def words(page: str) -> str:
    return " ".join(Text(page).words)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "under 1 s"),
        (3.4, "3 s"),
        (40, "40 s"),
        (89.4, "89 s"),
        (89.6, "1 min"),
        (121, "2 min"),
        (3599, "1 h"),
        (4200, "1 h 10 min"),
        (90_000, "25 h"),
    ],
)
def test_times_as_one_says_them(seconds: float, text: str) -> None:
    assert rough_time(seconds) == text


def test_announcement_of_a_stage() -> None:
    stage = {"stage": "sensitivity", "total": 36, "metric": "pqi", "forward_passes": 85.0, "estimated_seconds": 121.0}
    assert announcement(stage) == "pqi, about 2 min"
    assert announcement(stage, passes=True) == "pqi, about 2 min (85 forward passes)"
    assert announcement(stage | {"forward_passes": 1.0, "estimated_seconds": 0.1}, passes=True) == (
        "pqi, under 1 s (1 forward pass)"
    )
    free = stage | {"metric": "size", "forward_passes": 0.0, "estimated_seconds": 0.0}
    assert announcement(free, passes=True) == "size (no forward passes)"
    assert announcement({"stage": "measure", "total": 20}) == ""
    assert [passes_number(number) for number in (1.5, 20.0, 20.4, 1234.0)] == ["1.5", "20", "20", "1,234"]


def test_values_are_losses_or_scores() -> None:
    assert value_text("kl", 0.01234, 0.00123) == "0.0123 ± 0.001"
    assert value_text("pqi", -0.01234) == "−0.0123"
    assert value_text("pqi", -2e-6) == "−2.00e-06"
    assert value_text("size", 294_912.0) == "294,912"
    assert value_text("lrp", 1265.2, 84.0) == "1,265 ± 80"


def test_reports_tell_cost_merit_and_notes(search: Search) -> None:
    reports = {report.name: report for report in metric_reports(search)}
    assert list(reports) == ["hessian_trace", "kl", "pqi", "lrp"]
    assert (reports["hessian_trace"].took, reports["hessian_trace"].passes) == ("38 s", "20")
    assert reports["kl"].took == "reused"
    assert reports["pqi"].rank == "0.94 over 20 points"
    assert [name for name, report in reports.items() if report.relative] == ["lrp"]
    assert reports["lrp"].notes == examples.NOTES["lrp"]


def test_page_tells_a_note_once_beside_its_metric(client: TestClient, search: Search) -> None:
    page = client.get(f"/searches/{search.id}/sensitivities").text
    assert page.count("no relevance rule for &lt;Gelu&gt;") == 1
    assert "<Gelu>" not in page
    assert "lrp relative score relevance 3 min 23 0.92 over 20 points no relevance rule" in words(page)


def test_page_of_a_search_without_metrics(client: TestClient, engine: Engine) -> None:
    search_id, held = examples.claimed_search(engine)
    examples.enter_metric(engine, held, "pqi", 85.0, 121.0)
    running = words(client.get(f"/searches/{search_id}").text)
    assert "Sensitivities : pqi, about 2 min (85 forward passes), 0 of 36" in running
    succeed(engine, held, {})
    for path in (f"/searches/{search_id}", f"/searches/{search_id}/sensitivities"):
        assert client.get(path).status_code == 200


def test_panel_of_each_metric(client: TestClient, search: Search) -> None:
    panels = {
        name: client.get(f"/searches/{search.id}/sensitivities/{name}").text for name in search.request["sensitivity"]
    }
    assert all('"type": "heatmap"' in panel for panel in panels.values())
    assert [name for name, panel in panels.items() if "relative score" in panel] == ["lrp"]
    assert [name for name, panel in panels.items() if "predicted to fall" in panel] == ["pqi"]
    assert [name for name, panel in panels.items() if "Completeness" in panel] == ["pqi"]
    assert "−3.0% 4 nodes, midpoint" in words(panels["pqi"])
    missing = client.get(f"/searches/{search.id}/sensitivities/luck")
    assert missing.status_code == 404
    assert client.get("/searches/99/sensitivities/kl").status_code == 404


def table(values: list[list[float | None]], **changes: Any) -> dict[str, Any]:
    schemes = ["w4a16", "w8a8"][: len(values[0])]
    errors = [[None if value is None else 0.0 for value in row] for row in values]
    units = [f"layer.{n}.fc" for n in range(len(values))]
    return {
        "units": units, "schemes": schemes, "values": values, "weight": values, "activation": errors,
        "stderr": errors, "details": {}, "notes": [],
    } | changes  # fmt: skip


def units(count: int) -> list[dict[str, Any]]:
    return [{"name": f"layer.{n}.fc", "layers": [f"layer.{n}.fc"], "block": f"layer.{n // 2}"} for n in range(count)]


def test_heat_map_shows_every_value_once_in_network_order() -> None:
    figure = heatmap.heat_map("pqi", table([[0.1, -0.01], [0.001, None], [0.0, 1e-12]]), units(3))
    by_role = {trace["meta"]: trace for trace in figure["data"]}
    assert by_role["positive"]["y"] == ["w4a16", "w8a8"]
    low = -7.0
    assert by_role["positive"]["z"] == [[-1.0, -3.0, low], [None, None, low]], "logarithms; six decades at most"
    assert by_role["negative"]["z"] == [[None, None, None], [-2.0, None, None]], "a hue of its own on the same scale"
    assert {(trace["zmin"], trace["zmax"]) for trace in figure["data"]} == {(low, -1.0)}
    assert figure["layout"]["xaxis"]["ticktext"] == ["0", "1"]
    assert figure["layout"]["xaxis"]["tickvals"] == [0.5, 2.0], "in the middle of each block"
    assert [shape["x0"] for shape in figure["layout"]["shapes"]] == [1.5], "where a block begins"
    assert "−0.01" in by_role["negative"]["text"][1][0]
    assert "weights −0.01, activations" not in by_role["negative"]["text"][1][0]
    assert by_role["negative"]["text"][1][0].endswith("weights −0.01<br>activations 0")


@pytest.mark.parametrize("values", [[[0.0]], [[-1.0]], [[5.0], [5.0]], [[1e-300], [1e300]]])
def test_heat_map_of_odd_values_is_finite(values: list[list[float | None]]) -> None:
    for trace in heatmap.heat_map("pqi", table(values), units(len(values)))["data"]:
        assert trace["zmin"] < trace["zmax"]
        assert all(trace["zmin"] <= z <= trace["zmax"] for row in trace["z"] for z in row if z is not None)
        assert all(math.isfinite(tick) for tick in trace["colorbar"]["tickvals"])


def test_names_cannot_leave_the_heat_map() -> None:
    evil = table([[1.0]], units=["</script><b>x"])
    payload = heatmap.payload("kl", evil, [])
    assert "<" not in payload
    assert "&lt;/script&gt;&lt;b&gt;x" in json.loads(payload)["data"][0]["text"][0][0]


def test_completeness_is_told_where_it_is_known() -> None:
    check = {"measured": -0.5, "shares": -0.25, "nodes": 8, "rule": "gauss_legendre"}
    (row,) = completeness("pqi", table([[1.0, 1.0]], details={"completeness": {"w4a16": check, "w8a8": {}}}))
    assert (row.scheme, row.shares, row.measured, row.gap) == ("w4a16", "−0.25", "−0.5", "−50.0%")
    assert row.path == "8 nodes, gauss legendre"
    by_unit = {"layer.0.fc": {"w4a16": check}}
    assert completeness("pqi_single", table([[1.0, 1.0]], details={"completeness": by_unit})) == []
    nothing = {"w4a16": {"measured": 0.0, "shares": 0.0}}
    assert completeness("pqi", table([[1.0]], details={"completeness": nothing}))[0].gap == "—"


def test_bars_of_signed_and_relative_values(engine: Engine, search: Search, client: TestClient) -> None:
    point = candidates(engine, search.id)[9]
    rows = chosen_sensitivities(point, search.summary or {}, read_sensitivities(engine, search))
    assert len(rows) == 24
    first = [row.values["hessian_trace"].number for row in rows]
    assert first == sorted(first, reverse=True)
    values = [value for row in rows for value in row.values.values()]
    assert all(0 <= value.share <= 1 for value in values)
    assert any(value.negative and value.text.startswith("−") for value in values)
    page = client.get(f"/searches/{search.id}/points/9").text
    assert page.count("bar-negative") == sum(value.negative for value in values)
    assert "relative score" in page


def test_point_tells_weights_from_activations(client: TestClient, engine: Engine) -> None:
    search_id = examples.finished_search(engine, space=examples.ACTIVATIONS, budgets={"avg_bits": 6})
    uniform = {point.label: point.number for point in candidates(engine, search_id) if point.source == "uniform"}
    with_parts = client.get(f"/searches/{search_id}/points/{uniform['uniform w8a8']}").text
    part = '<span class="part">activations '
    assert with_parts.count(part) == 24 * 4
    assert part not in client.get(f"/searches/{search_id}/points/{uniform['uniform w8a16g64']}").text
