from __future__ import annotations

import io
import json

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
    assert document["axes"] == ["avg_bits"]
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
    assert all(not point["metrics"] for point in document["predicted"])


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


def test_standalone_page_needs_nothing_else(client: TestClient, frontier: Frontier) -> None:
    page = client.get("/v1/searches/1/frontier?format=html").text
    assert "plotly.js v" in page
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
