"""The page of a search's sensitivities, its panel, and the tables as files."""

from __future__ import annotations

import html
import io
import json
import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from api.pages.heatmap import heat_map
from api.pages.sensitivities import ROWS, outliers, rank_agreement, table_page
from api.sensitivities import read_sensitivities
from db.searches import get_search
from search.agreement import spearman
from tests.api import examples

PATH = "/searches/1/sensitivities"


def table_of(values: list[list[float | None]], schemes: list[str] | None = None) -> dict[str, Any]:
    """As a worker stores it."""
    schemes = schemes or ["w4a16g64", "w8a16g64"][: len(values[0])]
    units = [f"layer.{row}" for row in range(len(values))]
    nothing = [[0.0] * len(schemes)] * len(values)
    return {"units": units, "schemes": schemes, "values": values, "details": {}} | dict.fromkeys(
        ("stderr", "weight", "activation"), nothing
    )


@pytest.fixture
def search_id(engine: Engine) -> int:
    return examples.finished_search(engine)


@pytest.mark.usefixtures("search_id")
def test_the_table_has_every_unit_and_scheme_and_is_sorted_as_asked(client: TestClient, engine: Engine) -> None:
    table = read_sensitivities(engine, get_search(engine, 1))["kl"]
    page = client.get(PATH, params={"metric": "kl", "sort": "w5a16g64"}).text
    body = page.partition('<table class="sensitivities')[2].partition("</table>")[0]
    units = [html.unescape(re.sub("<[^>]+>", "", cell)) for cell in re.findall(r'<th scope="row">(.*?)</th>', body)]
    column = table["schemes"].index("w5a16g64")
    by_size = sorted(range(len(units)), key=lambda row: -table["values"][row][column])
    assert units == [table["units"][row] for row in by_size]
    assert body.count("bar-text") == 24 * 4
    assert 'aria-sort="descending"><a href="/searches/1/sensitivities?metric=kl&amp;sort=w5a16g64' in page
    plain = client.get(PATH).text
    assert "By hessian_trace" in plain, "the first metric of the request"
    assert plain.index("encoder.<wbr>layer.<wbr>0.") < plain.index("encoder.<wbr>layer.<wbr>5.")


@pytest.mark.usefixtures("search_id")
@pytest.mark.parametrize(
    ("asked", "status", "told"),
    [
        ({"metric": "colour"}, 404, "has no sensitivities by colour"),
        ({"sort": "w1a1"}, 422, "cannot be sorted by"),
        ({"page": 2}, 422, "there is no page 2"),
        ({"page": "01"}, 422, ""),
    ],
)
def test_what_cannot_be_shown_is_said(client: TestClient, asked: dict[str, Any], status: int, told: str) -> None:
    answer = client.get(PATH, params=asked, headers={"Accept": "text/html"})
    assert answer.status_code == status
    assert told in html.unescape(answer.text)


def test_a_search_without_a_table_has_a_page(client: TestClient, engine: Engine) -> None:
    running, _ = examples.claimed_search(engine)
    assert "No metric has finished yet." in client.get(f"/searches/{running}/sensitivities").text


def test_the_tables_of_a_thousand_layers_are_turned_page_by_page(client: TestClient, engine: Engine) -> None:
    search_id = examples.deep_search(engine, 167)
    path, seen = f"/searches/{search_id}/sensitivities", []
    for number in range(1, 8):
        answer = client.get(path, params={"page": number, "metric": "pqi"})
        assert len(answer.content) < 500_000
        body = answer.text.partition('<table class="sensitivities')[2]
        seen += re.findall(r'<th scope="row">(.*?)</th>', body.partition("</table>")[0])
    assert len(seen) == len(set(seen)) == 668
    assert "Page 7 of 7" in answer.text


@pytest.mark.usefixtures("search_id")
def test_rank_agreement_is_that_of_the_oracle(engine: Engine) -> None:
    tables = read_sensitivities(engine, get_search(engine, 1))
    found = rank_agreement(tables)
    assert found
    assert found.metrics == list(tables)
    values = {name: np.array(table["values"], dtype=float) for name, table in tables.items()}
    for row, one in enumerate(tables):
        for column, other in enumerate(tables):
            assert found.overall[row][column] == pytest.approx(spearman(values[one].ravel(), values[other].ravel()))
            by_scheme = [spearman(*pair) for pair in zip(values[one].T, values[other].T, strict=True)]
            assert found.within[row][column] == pytest.approx(np.mean([value for value in by_scheme if value]))


def test_agreement_passes_over_what_is_unknown_or_never_varies() -> None:
    rising = table_of([[float(row), None] for row in range(5)])
    falling = table_of([[-float(row), 1.0] for row in range(5)])
    same = table_of([[2.0, 2.0]] * 5)
    found = rank_agreement({"kl": rising, "pqi": falling, "size": same})
    assert found
    assert found.within[0] == [pytest.approx(1), pytest.approx(-1), None]
    assert rank_agreement({"kl": rising}) is None


def test_units_that_stand_out_are_named_with_the_metrics_that_agree() -> None:
    ordinary = [[value, value / 100] for value in np.exp(np.linspace(-1, 1, 20)).tolist()]
    tables = {
        "kl": table_of([*ordinary, [50.0, 0.9]]),
        "pqi": table_of([*ordinary, [-80.0, 0.01]]),
        "lrp": table_of([*ordinary, [1.0, 0.01]]),
    }
    (found,) = outliers("kl", tables)
    assert (found.unit, found.scheme, found.others) == ("layer.20", "w8a16g64", ["pqi"])
    assert found.times == pytest.approx(90, rel=0.1)
    assert outliers("lrp", tables) == []
    row = table_page("kl", tables["kl"], "network", 1).rows[-1]
    assert [entry.outlier for entry in row.entries if entry] == [True, True]


def test_a_scheme_that_is_not_allowed_has_no_entry_and_sorts_last() -> None:
    table = table_of([[None, 1.0], [2.0, 3.0], [5.0, 2.0]])
    page = table_page("kl", table, "w4a16g64", 1)
    assert [row.unit for row in page.rows] == ["layer.2", "layer.1", "layer.0"]
    assert page.rows[-1].entries[0] is None
    assert table_page("kl", table_of([[1.0, 1.0]] * (ROWS + 1)), "network", 2).rows[0].unit == f"layer.{ROWS}"


@pytest.mark.usefixtures("search_id")
def test_the_tables_are_handed_out_as_parquet_as_they_are_as_csv(client: TestClient) -> None:
    data = f"/v1{PATH}"
    answer = client.get(data, params={"format": "parquet"})
    assert answer.headers["content-type"] == "application/vnd.apache.parquet"
    assert 'filename="search-1-sensitivities.parquet"' in answer.headers["content-disposition"]
    parquet = pd.read_parquet(io.BytesIO(answer.content))
    csv = pd.read_csv(io.StringIO(client.get(data, params={"format": "csv"}).text))
    pd.testing.assert_frame_equal(parquet, csv, check_dtype=False)
    assert len(parquet) == 4 * 24 * 4
    tables = client.get(data).json()["tables"]
    row = parquet.iloc[-1]
    assert row.sensitivity == tables[row.metric]["values"][-1][-1]
    described = client.get("/openapi.json").json()["paths"]["/v1/searches/{search_id}/sensitivities"]["get"]
    assert "application/vnd.apache.parquet" in described["responses"]["200"]["content"]
    asked = next(one for one in described["parameters"] if one["name"] == "format")
    assert asked["schema"]["enum"] == ["json", "csv", "parquet"]
    page = client.get(PATH).text
    assert f'href="{data}?format=parquet"' in page


def test_names_of_blocks_are_no_markup_to_plotly() -> None:
    units = [{"name": f"net.<b>{row}.fc", "block": f"net.<b>{row}"} for row in range(2)]
    table = table_of([[1.0, 2.0], [3.0, 4.0]]) | {"units": [unit["name"] for unit in units]}
    figure = heat_map("kl", table, units)
    assert figure["layout"]["xaxis"]["ticktext"] == ["&lt;b&gt;0", "&lt;b&gt;1"]
    assert "<b>net.&lt;b&gt;0.fc</b>" in figure["data"][0]["text"][0][0]
    inner = heat_map("kl", table, [unit | {"block": f"<i>.{row}"} for row, unit in enumerate(units)])
    assert inner["layout"]["xaxis"]["title"]["text"] == "Block of &lt;i&gt;"
    json.dumps(figure, allow_nan=False)
