from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from api.frontier import Frontier
from db.candidates import candidates
from db.models import put_model
from db.searches import get_search
from tests.api import examples


@pytest.fixture
def frontier(engine: Engine) -> Frontier:
    search_id = examples.finished_search(engine)
    return Frontier(get_search(engine, search_id), tuple(candidates(engine, search_id)))


def test_frontier_holds_fitting_points_and_the_baselines(client: TestClient, frontier: Frontier) -> None:
    document = client.get("/v1/searches/1/frontier").json()
    assert document["axes"] == ["avg_bits", "size_bytes"]
    assert document["budgets"] == {"avg_bits": 5.25, "size_mb": 40}
    points = document["points"]
    assert all(point["fits"] and point["on_frontier"] for point in points)
    assert [p["costs"]["avg_bits"] for p in points] == sorted(p["costs"]["avg_bits"] for p in points)
    losses = [point["metrics"]["loss"] for point in points]
    assert losses == sorted(losses, reverse=True), "dearer is better"
    assert document["best"] == points[-1]["number"]
    assert len(document["baselines"]) == 4
    assert "dominated" not in document
    assert "predicted" not in document


def test_a_request_with_limits_on_some_layers_has_a_frontier_too(client: TestClient, engine: Engine) -> None:
    limits = {"*.output.dense": {"avg_bits": 6.25}, "kind:embedding": {"size_mb": 20}}
    search_id = examples.finished_search(engine, budgets={"avg_bits": 5.25, "limits": limits})
    search = client.get(f"/v1/searches/{search_id}").json()
    document = client.get(f"/v1/searches/{search_id}/frontier").json()
    assert search["budgets"] == document["budgets"] == {"avg_bits": 5.25}
    assert document["limits"] == limits
    assert document["points"]
    page = client.get(f"/searches/{search_id}").text
    assert "≤ 6.25 bits per weight of *.output.dense" in page
    assert "≤ 20 MB of kind:embedding" in page


def test_groups_together_are_all_candidates(client: TestClient, frontier: Frontier) -> None:
    document = client.get("/v1/searches/1/frontier?include=dominated,predicted,baselines").json()
    numbers = {
        point["number"] for group in ("points", "dominated", "predicted", "baselines") for point in document[group]
    }
    assert numbers == {candidate.number for candidate in frontier.candidates}
    assert all("loss" not in point["metrics"] for point in document["predicted"])


def test_tables_agree_with_the_document(client: TestClient, frontier: Frontier) -> None:
    params = {"include": "baselines,dominated"}
    document = client.get("/v1/searches/1/frontier", params=params).json()
    csv = client.get("/v1/searches/1/frontier", params=params | {"format": "csv"})
    parquet = client.get("/v1/searches/1/frontier", params=params | {"format": "parquet"})
    assert 'filename="search-1-frontier.csv"' in csv.headers["content-disposition"]
    table = pd.read_csv(io.StringIO(csv.text), index_col="number")
    pd.testing.assert_frame_equal(table, pd.read_parquet(io.BytesIO(parquet.content)), check_dtype=False)
    for point in document["points"]:
        row = table.loc[point["number"]]
        assert (row["loss"], row["avg_bits"]) == (point["metrics"]["loss"], point["costs"]["avg_bits"])
        assert row["predicted_kl"] == point["predicted"]["kl"]


def test_the_best_point_under_other_budgets(client: TestClient, frontier: Frontier) -> None:
    def best_under(text: str) -> int | None:
        number: int | None = client.get("/v1/searches/1/frontier", params={"under": text}).json()["best_under"]
        return number

    points = {point.number: point for point in frontier.measured}
    within = [point for point in frontier.measured if point.costs["avg_bits"] <= 4.75]
    assert best_under("avg_bits:4.75") == min(within, key=lambda point: point.metrics["loss"]).number
    wider = best_under("avg_bits:8.25, size_mb:1000")
    assert wider is not None
    assert points[wider].metrics["loss"] == min(point.metrics["loss"] for point in frontier.measured)
    assert not points[wider].fits, "in place of the budgets of the search"
    assert best_under("avg_bits:4.75,loss_increase:1e-9") is None
    assert "best_under" not in client.get("/v1/searches/1/frontier").json()


@pytest.mark.parametrize("under", ["bits:4", "avg_bits", "avg_bits:four", "size_mb:-1", "size_mb:nan", "size_mb:inf"])
def test_other_budgets_that_make_no_sense_are_refused(client: TestClient, frontier: Frontier, under: str) -> None:
    answer = client.get("/v1/searches/1/frontier", params={"under": f"avg_bits:5,{under}"})
    assert answer.status_code == 422
    problem = answer.json()
    assert problem["field"] == "under"
    assert f"'{under}' is not a budget" in problem["detail"]
    assert "avg_bits, size_mb, gbitops, latency_ms, loss_increase" in problem["accepted"]


def test_knee_and_hypervolume_are_of_cost_and_log_loss(client: TestClient, frontier: Frontier) -> None:
    document = client.get("/v1/searches/1/frontier").json()
    line = frontier.line("avg_bits")
    drawn = np.array([[point.costs["avg_bits"], np.log(point.metrics["loss"])] for point in line])
    scaled = (drawn - drawn.min(axis=0)) / np.ptp(drawn, axis=0)
    assert document["knee"] == line[int(scaled.sum(axis=1).argmin())].number
    # The mean of ln(worst ÷ frontier), by a fine grid of budgets.
    least, worst = frontier.search.summary["feasible"]["avg_bits"]["min"], max(p.loss for p in frontier.baselines)
    gains = []
    for budget in np.linspace(least, 5.25, 20_001):
        found = frontier.best_under({"avg_bits": budget, "size_mb": 40})
        gains.append(max(0.0, np.log(worst / found.loss)) if found else 0.0)
    assert document["hypervolume"] == pytest.approx(np.mean(gains), rel=1e-3)


def test_a_lossless_point_does_not_break_what_takes_logarithms(frontier: Frontier) -> None:
    lossless = [replace(point, metrics={"loss": 0.0}) for point in frontier.candidates]
    broken = replace(frontier, candidates=tuple(lossless))
    assert broken.hypervolume is None or np.isfinite(broken.hypervolume)
    assert broken.knee is None


def test_references_bound_what_is_predicted(client: TestClient, frontier: Frontier) -> None:
    reference = client.get("/v1/searches/1/frontier").json()["reference"]
    assert reference["axis"] == "avg_bits"
    for point in frontier.points:
        for level, bound, ideal in zip(
            reference["levels"], reference["lower_bound"], reference["rate_distortion"], strict=True
        ):
            if point.costs["avg_bits"] <= level:
                assert ideal < bound <= point.predicted["hessian_trace"] * (1 + 1e-9)


def test_a_cost_as_the_objective_makes_the_cheapest_point_the_best(client: TestClient, frontier: Frontier) -> None:
    request = frontier.search.request
    sought = request | {"optimizer": request["optimizer"] | {"objective": "size_mb"}}
    cheapest = replace(frontier, search=replace(frontier.search, request=sought)).best
    fitting = [point for point in frontier.measured if point.fits]
    assert cheapest is not None
    assert cheapest.costs["size_bytes"] == min(point.costs["size_bytes"] for point in fitting)
    assert cheapest != frontier.best


def test_standalone_page_needs_nothing_else(client: TestClient, frontier: Frontier) -> None:
    page = client.get("/v1/searches/1/frontier?format=html").text
    assert "plotly.js v" in page
    assert "is the best that fits. 1.2× less loss than uniform w5a16g64" in page
    assert "<script src" not in page
    assert "<link" not in page


def test_frontier_of_a_search_without_results(client: TestClient, engine: Engine) -> None:
    search_id = examples.queued_search(engine)
    document = client.get(f"/v1/searches/{search_id}/frontier").json()
    assert (document["points"], document["best"]) == ([], None)
    for format in ("csv", "parquet", "html"):
        assert client.get(f"/v1/searches/{search_id}/frontier?format={format}").status_code == 200
    assert client.get(f"/v1/searches/{search_id}/sensitivities").json()["tables"] == {}
    assert client.get(f"/v1/searches/{search_id}/sensitivities?format=csv").status_code == 200


def test_sensitivities(client: TestClient, frontier: Frontier) -> None:
    tables = client.get("/v1/searches/1/sensitivities").json()["tables"]
    assert list(tables) == ["hessian_trace", "kl", "pqi", "lrp"], "in the order of the request"
    assert tables["lrp"]["notes"] == examples.NOTES["lrp"], "as the worker stored it"
    csv = pd.read_csv(io.StringIO(client.get("/v1/searches/1/sensitivities?format=csv").text))
    assert len(csv) == 4 * 24 * 4
    first = tables["kl"]
    row = csv[(csv.metric == "kl") & (csv.unit == first["units"][3]) & (csv.scheme == first["schemes"][1])]
    assert row.sensitivity.item() == first["values"][3][1]
    assert (csv[csv.metric == "pqi"].sensitivity < 0).any(), "signed values stay signed"


def test_sensitivities_tell_weights_from_activations(client: TestClient, engine: Engine) -> None:
    search_id = examples.finished_search(engine, space=examples.ACTIVATIONS, budgets={"avg_bits": 6})
    csv = pd.read_csv(io.StringIO(client.get(f"/v1/searches/{search_id}/sensitivities?format=csv").text))
    columns = ["metric", "unit", "scheme", "sensitivity", "weight_part", "activation_part", "stderr"]
    assert list(csv.columns) == columns
    assert (csv.weight_part + csv.activation_part).tolist() == pytest.approx(csv.sensitivity.tolist())
    rounded = csv.scheme == "w8a8"
    assert (csv[rounded].activation_part != 0).all()
    assert (csv[~rounded].activation_part == 0).all()


def test_comparison_takes_the_best_baseline_at_no_larger_cost(frontier: Frontier) -> None:
    by_bits = sorted(frontier.baselines, key=lambda point: point.costs["avg_bits"])
    for point in frontier.measured:
        comparison = frontier.compare(point)
        cheaper = [base for base in by_bits if base.costs["avg_bits"] <= point.costs["avg_bits"]]
        if point.source == "uniform" or not cheaper:
            assert comparison is None
        else:
            assert comparison is not None
            assert comparison.baseline == cheaper[-1]


def test_allocations_are_read_of_the_points_that_show_them(
    client: TestClient, engine: Engine, frontier: Frontier, queries: list[str]
) -> None:
    document = client.get("/v1/searches/1/frontier?include=baselines,dominated,predicted").json()
    stored = {point.number: point.allocation for point in frontier.candidates}
    for group, spelled_out in {"points": True, "baselines": True, "dominated": False, "predicted": False}.items():
        assert document[group]
        for point in document[group]:
            assert point.get("allocation") == (stored[point["number"]] if spelled_out else None)
    del queries[:]
    for path in (
        "/",
        "/searches/1",
        "/v1/searches",
        *(f"/v1/searches/1/frontier?format={name}" for name in ("csv", "parquet", "html")),
    ):
        assert client.get(path).status_code == 200
    read = [query for query in queries if "FROM candidates" in query]
    assert len(read) == 6
    whole = [query for query in read if "candidates.allocation" in query]
    assert len(whole) == 1, "of the point that the page of the search has in hand"
    assert "candidates.number = " in whole[0]


def test_point_and_its_files(client: TestClient, frontier: Frontier) -> None:
    best = frontier.best
    assert best is not None
    point = client.get(f"/v1/searches/1/points/{best.number}").json()
    assert point["allocation"] == best.allocation
    answer = client.get(f"/v1/searches/1/points/{best.number}/config?format=vllm")
    assert answer.headers["content-disposition"].startswith("attachment; filename=")
    assert json.loads(answer.text)["quant_method"] == "compressed-tensors"
    native = client.get(f"/v1/searches/1/points/{best.number}/config")
    assert "encoder.layer.0.output.dense" in native.text


def test_export_is_refused_when_the_model_has_changed(client: TestClient, engine: Engine, frontier: Frontier) -> None:
    put_model(engine, examples.MODEL, "elsewhere", examples.encoder(blocks=2))
    put_model(engine, examples.MODEL, "elsewhere", None)
    answer = client.get("/v1/searches/1/points/4/config?format=vllm")
    assert answer.status_code == 409
    assert "register it again" in answer.json()["detail"]
