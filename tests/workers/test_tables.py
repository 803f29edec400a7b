"""What is not finite is refused by name, and units that cost nothing are noted."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sqlalchemy import Engine
from torch import Tensor

from db.candidates import candidates
from db.results import get_results
from db.searches import get_search
from search.errors import UnsupportedModel
from search.metrics import METRICS
from search.scheme import Scheme
from search.space import Space, Unit
from tests import models
from tests.aside import wait_until
from tests.search import spaces
from tests.workers.searching import SCHEMES, ask, work
from workers.sensitivity import Entry, Table
from workers.tables import check_result, with_idle_units_noted
from workers.worker import Worker

pytestmark = pytest.mark.long


def overflow_when_rounded(weights: dict[str, Tensor]) -> None:
    """0.6 of a row's greatest weight is 0.67 at two and at four bits: beyond float32, where the input is so large."""
    row = weights["classifier.weight"][0].fill_(0.6)
    row[0] = 1.0
    weights["vit.layernorm.bias"].fill_(0.94 * torch.finfo(torch.float32).max / float(row.sum()))


SOME = {"dataset": "some", "samples": 8}


def save_some(folder: Path, images: np.ndarray) -> None:
    """As the data set of `SOME`: of twenty-four images every one is drawn."""
    np.savez(folder / "some.npz", images=images)


def failed_at_once(engine: Engine, **changes: object) -> dict[str, object]:
    """The problem of a search that a worker gives up at the first attempt."""
    search = ask(engine, calibration=SOME, **changes)
    wait_until(lambda: get_search(engine, search.id).state != "queued")
    wait_until(lambda: get_search(engine, search.id).state != "running")
    done = get_search(engine, search.id)
    assert (done.state, done.attempt) == ("failed", 1), done.error
    assert done.error is not None
    return done.error


class TestWhatIsNotFinite:
    """Fails the search at once, and says what is wrong: another attempt would find the same."""

    @pytest.mark.parametrize("metric", ["fisher", "kl"])
    def test_an_image(self, digits: Engine, worker: Worker, datasets_folder: Path, metric: str) -> None:
        images = models.digits_arrays()[0][-24:].copy()
        images[5, 0, 3, 3] = np.nan
        save_some(datasets_folder, images)
        problem = failed_at_once(digits, sensitivity=[metric])
        assert problem["type"] == "urn:bitfrontier:problem:invalid-calibration"
        assert (problem["field"], problem["value"]) == ("calibration.dataset", "some")
        assert "image 5 of 'some'" in str(problem["detail"])
        assert problem["accepted"] == "images of finite numbers"

    def test_the_models_output_on_an_image_of_any_split(
        self, digits: Engine, worker: Worker, datasets_folder: Path
    ) -> None:
        said = set()
        for index in (0, 1, 2, 9):
            images = models.digits_arrays()[0][-24:].copy()
            images[index] = np.finfo(np.float32).max
            save_some(datasets_folder, images)
            problem = failed_at_once(digits, sensitivity=["fisher", "kl"])
            assert problem["field"] == "model"
            said.add("calibration samples" in str(problem["detail"]))
            assert "output of this ViTForImageClassification is not finite" in str(problem["detail"])
        assert said == {True, False}

    @pytest.mark.parametrize("metric", ["kl", "autoscheme"])
    def test_the_output_of_a_rounded_model(
        self, digits: Engine, worker: Worker, datasets_folder: Path, changed: Callable[..., None], metric: str
    ) -> None:
        save_some(datasets_folder, models.digits_arrays()[0][-24:])
        changed(overflow_when_rounded)
        problem = failed_at_once(digits, model="changed", sensitivity=[metric])
        assert problem["type"] == "urn:bitfrontier:problem:unsupported-model"
        assert (problem["field"], problem["value"]) == ("sensitivity", metric)
        assert f"{metric} is not finite for " in str(problem["detail"])
        assert "at the schemes of the space" in str(problem["accepted"])
        if metric == "kl":
            assert "not finite for classifier:" in str(problem["detail"])

    @pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
    def test_a_number_in_a_result_names_the_units_above_it(self, number: float) -> None:
        space = spaces.space(spaces.decoder(), "generic")
        first, second, *_ = (unit.layers[0].name for unit in space.units)
        result = {"weights": {first: {"w4a16g32": [0.1, 0.2]}, second: {"w4a16g32": [0.1, number]}}}
        with pytest.raises(UnsupportedModel) as refused:
            check_result(METRICS["fisher"], {"weights": {first: [], second: []}}, result, space)
        assert (refused.value.field, refused.value.value) == ("sensitivity", "fisher")
        assert f"for {second}:" in refused.value.detail

    def test_a_number_in_a_tuple_which_is_a_list_once_it_is_stored(self) -> None:
        space = spaces.space(spaces.decoder(), "generic")
        with pytest.raises(UnsupportedModel, match=space.units[0].name):
            check_result(METRICS["higgs"], {}, {space.units[0].name: (0.1, float("nan"))}, space)

    def test_results_of_finite_numbers_pass(self) -> None:
        space = spaces.space(spaces.decoder(), "generic")
        check_result(METRICS["fisher"], {}, {"sizes": [1, 2], "weights": {"nan": [0.1, -1e300, None, "nan"]}}, space)

    def test_a_number_under_no_unit_names_at_most_five_of_those_that_were_asked_for(self) -> None:
        space = spaces.space(spaces.decoder(), "generic")
        names = [layer.name for layer in space.layers]
        with pytest.raises(UnsupportedModel) as refused:
            check_result(METRICS["pqi"], {"layers": names}, {"weight": [[0.0, float("nan")]]}, space)
        assert f"for {', '.join(names[:5])} and {len(names) - 5} more:" in refused.value.detail


class TestUnitsThatCostNothing:
    """A note names the units for which a metric predicts no loss, whatever they are rounded to."""

    SCHEMES = ("w4a16g32", "w8a16g32", "w16a16")

    def note(self, nothing: Callable[[Unit, Scheme], bool], **request: object) -> tuple[Space, str]:
        """The one note of a table in which some entries are 0, or nothing."""
        space = spaces.space(spaces.decoder(), "generic", schemes=self.SCHEMES, **request)
        table = Table.of(
            space, lambda unit, scheme: Entry(0.0 if nothing(unit, scheme) else 0.1, 0.0, 0.01), notes=["as before"]
        )
        before, *added = with_idle_units_noted(table, space).notes
        assert before == "as before"
        assert len(added) <= 1
        return space, "".join(added)

    def test_one(self) -> None:
        name = "model.layers.0.mlp.up_proj"
        _, note = self.note(lambda unit, scheme: unit.name == name or str(scheme) == "w16a16")
        assert note == (
            f"no loss is predicted at any scheme for {name}: the loss does not depend on it, "
            "or rounding hardly changes it"
        )

    def test_more_than_five_are_counted(self) -> None:
        space, note = self.note(lambda _unit, _scheme: True)
        names = [unit.name for unit in space.units]
        assert f"for {', '.join(names[:5])} and {len(names) - 5} more: the loss does not depend on them" in note

    def test_one_that_costs_something_at_one_scheme_is_not_named(self) -> None:
        assert self.note(lambda _unit, scheme: str(scheme) != "w4a16g32")[1] == ""

    def test_one_that_stays_in_full_precision_is_not_named(self) -> None:
        pinned = "model.layers.0.mlp.up_proj"
        _, note = self.note(lambda unit, scheme: unit.name == pinned or str(scheme) == "w16a16", pin={pinned: "w16a16"})
        assert note == ""

    def test_every_metric_that_looks_at_the_loss_says_so(self, digits: Engine, changed: Callable[..., None]) -> None:
        def cut(weights: dict[str, Tensor]) -> None:
            """What the first half of the first block's MLP gives is multiplied by 0."""
            weights["vit.encoder.layer.0.output.dense.weight"].zero_()

        changed(cut)
        asked = ["kl", "fisher", "higgs", "lrp", "gradient", "weight_mse", "size"]
        small = {"dataset": "digits", "samples": 16}
        few = {"method": "ilp", "points": 2, "evaluations": 6}
        search = ask(digits, model="changed", calibration=small, sensitivity=asked, optimizer=few)
        work(digits)
        summary = get_search(digits, search.id).summary
        assert summary is not None
        notes = {name: [note for note in one["notes"] if "no loss" in note] for name, one in summary["metrics"].items()}
        for name in asked[:-2]:
            (note,) = notes[name]
            assert "vit.layers.0.mlp.fc1, vit.layers.0.mlp.fc2: the loss does not depend on them" in note, name
            table = get_results(digits, [summary["tables"][name]])[summary["tables"][name]].value
            assert note in table["notes"]
        assert notes["weight_mse"] == notes["size"] == []


def test_every_metric_serves_a_search(digits: Engine) -> None:
    """All tables are stored and read back, all corrected by the baselines, and all propose and are judged."""
    asked = [name for name in METRICS if name != "pqi_single"]
    small = {"dataset": "digits", "samples": 16}
    search = ask(digits, calibration=small, sensitivity=asked, optimizer={"points": 2, "evaluations": 8})
    work(digits)
    done = get_search(digits, search.id)
    assert done.state == "succeeded"
    assert done.summary is not None
    assert set(done.summary["tables"]) == set(asked)
    assert set(done.summary["agreement"]) == set(asked)
    tables = get_results(digits, list(done.summary["tables"].values()))
    for name, key in done.summary["tables"].items():
        assert Table.from_json(tables[key].value).values.shape == (len(done.summary["units"]), len(SCHEMES)), name
    assert all(set(one.predicted) == set(asked) for one in candidates(digits, search.id))
