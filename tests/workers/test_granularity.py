"""Searches in which groups of output channels, or whole blocks, take a scheme: a real classifier, in real Postgres."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine

from db.candidates import candidates
from db.models import get_model
from db.searches import Search, create_search, get_search
from search.candidate import Candidate
from search.errors import ExportRefused, InvalidRequest
from search.exports import EXPORTS, Exported, render
from search.exports.native import read_native
from search.inventory import by_whole
from search.request import SearchRequest
from tests.workers.searching import work
from workers.evaluator import Evaluator
from workers.profiling import evaluator_spec

CHANNELS = {"granularity": "channels", "channels": 24}


def searched(engine: Engine, space: dict[str, object], **changes: object) -> tuple[Search, list[Candidate]]:
    document = {
        "model": "digits-vit",
        "calibration": {"dataset": "digits", "samples": 24},
        "space": {"schemes": ["w2a16", "w3a16", "w4a16", "w8a16"]} | space,
        "budgets": {"avg_bits": 4.5},
        "optimizer": {"points": 4, "evaluations": 10},
    }
    search, _ = create_search(engine, SearchRequest.model_validate(document | changes))
    work(engine)
    return get_search(engine, search.id), candidates(engine, search.id)


def assert_frontier(found: list[Candidate]) -> None:
    frontier = [candidate for candidate in found if candidate.on_frontier]
    assert any(candidate.source != "uniform" for candidate in frontier)
    assert all(candidate.loss is not None and candidate.costs["avg_bits"] <= 4.5 for candidate in frontier)


def test_groups_of_channels_end_in_a_frontier_whose_points_can_be_applied_again(digits: Engine) -> None:
    done, found = searched(digits, CHANNELS | {"pin": {"classifier": "w8a16"}})
    assert_frontier(found)
    assert done.summary is not None
    # The patches' convolution stays whole, and so does what has no more channels than a group.
    assert [layer["rows"] for layer in done.summary["layers"][:4]] == [64, 24, 24, 16]
    point = max((one for one in found if one.on_frontier), key=lambda one: len(set(one.allocation.values())))
    parts = by_whole(point.allocation)
    assert any(len({point.allocation[name] for name in names}) > 1 for names in parts.values())
    assert point.allocation["classifier"] == "w8a16"

    ours = Evaluator.build(evaluator_spec(digits, SearchRequest.model_validate(done.request)))
    model = get_model(digits, "digits-vit")
    assert model is not None
    assert model.inventory is not None
    exported = Exported(done.model, model.inventory, done.target, "rtn", point)
    read = read_native(render("json", exported))
    assert any("[" in layer.name for layer in read.layers)
    assert ours.measure(read.schemes)["loss"] == pytest.approx(point.loss, rel=1e-6)
    for name in sorted(set(EXPORTS) - {"csv", "json"}):
        with pytest.raises(ExportRefused, match="several schemes"):
            render(name, exported)


def test_groups_of_channels_move_along_ladders_from_the_predicted_frontier(digits: Engine) -> None:
    optimizer = {"points": 4, "evaluations": 36}
    done, found = searched(digits, CHANNELS, sensitivity=["fisher"], optimizer=optimizer)
    assert_frontier(found)
    assert done.summary is not None
    assert done.summary["evaluations"] <= 36
    predicted, refined = ([one for one in found if one.source == source] for source in ("ilp", "refined"))
    # Of so many groups a few drawn configurations would say nothing.
    assert all(one.label.startswith("fisher") for one in predicted)
    assert refined
    # The first expansion is of a predicted configuration, and some of its layers stay as they are.
    steps = [sum(other.allocation[name] != to for name, to in refined[0].allocation.items()) for other in predicted]
    assert 0 < min(steps) < len(refined[0].allocation) / 2


def test_blocks_end_in_a_frontier_in_which_each_has_one_scheme(digits: Engine) -> None:
    done, found = searched(digits, {"granularity": "block"})
    assert_frontier(found)
    assert done.summary is not None
    units = {unit["name"]: unit["layers"] for unit in done.summary["units"]}
    assert {name: len(layers) for name, layers in units.items() if len(layers) > 1} == {
        f"vit.layers.{block}": 6 for block in range(3)
    }
    for candidate in found:
        assert all(len({candidate.allocation[layer] for layer in layers}) == 1 for layers in units.values())


def test_a_target_that_loads_whole_layers_refuses_groups_of_channels(digits: Engine) -> None:
    with pytest.raises(InvalidRequest, match="target 'vllm' loads one scheme for all output channels"):
        searched(digits, CHANNELS, target="vllm")
