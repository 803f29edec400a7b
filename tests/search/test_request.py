"""What a person may ask: strict, with defaults for all but the model and one budget."""

import pytest
from pydantic import ValidationError

from search.errors import InvalidRequest
from search.request import SearchRequest
from search.scheme import Scheme
from search.targets import TARGETS, Target


def ask(**changes: object) -> SearchRequest:
    return SearchRequest.model_validate({"model": "m", "budgets": {"avg_bits": 4.25}} | changes)


def test_a_model_and_a_budget_suffice() -> None:
    request = ask()
    assert request.budgets.named() == {"avg_bits": 4.25}
    assert request.sensitivity == ("fisher", "kl")


def test_the_examples_in_the_documentation_are_valid() -> None:
    for example in SearchRequest.model_json_schema()["examples"]:
        SearchRequest.model_validate(example)


def test_a_request_survives_json() -> None:
    request = ask(space={"pin": {"*.down_proj": "w8a16g64"}}, budgets={"avg_bits": 5, "size_mb": 70})
    assert SearchRequest.model_validate_json(request.model_dump_json()) == request


def test_schemes_are_sorted_and_named_once() -> None:
    assert ask(space={"schemes": ["w8a16", "w4a16", "w8a16"]}).space.schemes == ("w4a16", "w8a16")


@pytest.mark.parametrize(
    "changes",
    [
        {"budgets": {}},
        {"budgets": {"avg_bits": None}},
        {"budgets": {"avg_bits": 0}},
        {"budgets": {"avg_bits": float("nan")}},
        {"budgets": {"avg_bits": float("inf")}},
        {"budgets": {"bits": 4}},
        {"budgets": {"size_mb": 1e308}},
        {"model": "../etc/passwd"},
        {"model": "https://example.org/model"},
        {"model": "a/b/c"},
        {"target": "nothing"},
        {"sensitivity": []},
        {"sensitivity": ["guess"]},
        {"calibration": {"samples": 0}},
        {"calibration": {"dataset": "../secret"}},
        {"space": {"ignore": ["a\x00b"]}},
        {"optimizer": {"evaluations": 0}},
        {"colour": "blue"},
        {"budgets": {"avg_bits": "5"}},
        {"budgets": {"avg_bits": True}},
        {"budgets": {"avg_bits": 10**400}},
        {"budgets": {"limits": {"*": {"size_mb": "5"}}}},
        {"calibration": {"samples": "32"}},
        {"calibration": {"samples": True}},
        {"calibration": {"samples": 32.5}},
        {"calibration": {"seed": 2**64}},
        {"calibration": {"dataset": "images/../../secret"}},
        {"calibration": {"dataset": "images//more"}},
        {"calibration": {"dataset": "images/.hidden"}},
        {"optimizer": {"points": False}},
        {"space": {"granularity": "channels", "channels": "64"}},
        {"latency": {"profile": "x", "tokens": "8"}},
        {"space": {"ignore": ["x"] * 1001}},
        {"space": {"pin": {"\ud800": "w4a16"}}},
    ],
)
def test_what_is_not_accepted_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ask(**changes)


def test_whole_numbers_and_data_sets_in_folders_are_accepted() -> None:
    request = ask(budgets={"avg_bits": 5}, calibration={"dataset": "org/a-b_c.d/part/", "samples": 4096})
    assert request.budgets.avg_bits == 5.0
    assert request.calibration.dataset == "org/a-b_c.d/part/"


def test_a_cost_is_sought_only_below_a_limit_on_the_loss() -> None:
    smallest = ask(budgets={"loss_increase": 0.01}, optimizer={"objective": "size_mb"})
    assert smallest.optimizer.objective == "size_mb"
    assert ask().optimizer.objective == "loss"
    with pytest.raises(InvalidRequest, match="without a limit on the loss") as refused:
        ask(optimizer={"objective": "size_mb"})
    assert refused.value.problem()["field"] == "optimizer.objective"
    assert "budgets.loss_increase" in refused.value.problem()["accepted"]


def test_an_unknown_scheme_is_refused_with_the_grammar() -> None:
    with pytest.raises((ValidationError, InvalidRequest), match="not a scheme"):
        ask(space={"schemes": ["int4"]})


@pytest.mark.parametrize(
    ("space", "field", "told"),
    [
        ({"granularity": "channels"}, "space.channels", "with granularity 'channels', and only then"),
        ({"channels": 64}, "space.channels", "with granularity 'channels', and only then"),
        ({"granularity": "block", "channels": 64}, "space.channels", "with granularity 'channels', and only then"),
        ({"schemes": ["w4a16", "w8a8"]}, "space.schemes", "w8a8 quantizes activations"),
        ({"pin": {"*.fc": "w4a8"}}, "space.pin", "w4a8 quantizes activations"),
    ],
)
def test_groups_of_channels_have_a_size_and_schemes_of_weights_alone(
    space: dict[str, object], field: str, told: str
) -> None:
    groups = {} if field == "space.channels" else {"granularity": "channels", "channels": 64}
    with pytest.raises(InvalidRequest, match=told) as refused:
        ask(space=groups | space)
    assert refused.value.field == field
    assert refused.value.accepted
    assert ask(space={"granularity": "channels", "channels": 64, "schemes": ["w4a16", "w16a16"]}).space.channels == 64


@pytest.mark.parametrize("metric", ["gradient", "lrp"])
def test_a_metric_of_whole_layers_says_which_metrics_see_groups_of_channels(metric: str) -> None:
    groups = {"granularity": "channels", "channels": 64}
    with pytest.raises(InvalidRequest, match=f"{metric} looks at what whole layers give") as refused:
        ask(space=groups, sensitivity=["fisher", metric])
    assert (refused.value.field, refused.value.value) == ("sensitivity", metric)
    others = refused.value.accepted
    assert {"fisher", "kl", "hessian_trace", "weight_mse", "size"} <= set(others)
    assert ask(space=groups, sensitivity=others).sensitivity == tuple(others)
    assert ask(space={"granularity": "block"}, sensitivity=[metric]).sensitivity == (metric,)


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_schemes_that_are_left_out_are_those_of_the_target(target: Target) -> None:
    request = SearchRequest.model_validate({"model": "m", "target": target.name, "budgets": {"avg_bits": 5}})
    assert request.space.schemes == target.default_schemes
    assert not any(target.refuses_scheme(Scheme.parse(text)) for text in request.space.schemes)
    assert SearchRequest.model_validate(request.model_dump(mode="json")) == request
    named = {"model": "m", "target": target.name, "budgets": {"avg_bits": 5}, "space": {"schemes": ["w8a16g32"]}}
    assert SearchRequest.model_validate(named).space.schemes == ("w8a16g32",)
