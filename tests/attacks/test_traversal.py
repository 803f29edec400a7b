"""A name never leads out of the models roots and the data sets folder, nor to another machine."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from db.models import put_model
from db.searches import create_search, get_search
from search.errors import InvalidCalibration, UnsupportedModel
from search.names import HUB
from search.request import SearchRequest
from tests import models
from tests.api.examples import MODEL
from tests.aside import wait_until
from tests.attacks.conftest import all_refused
from tests.attacks.corpus import ESCAPES, HARMLESS
from tests.workers.searching import working
from workers import datasets
from workers.sources import find_model
from workers.worker import Worker

SECRET = "the secret"
_watching: list[list[str]] = []


def _audit(event: str, about: tuple[object, ...]) -> None:
    if _watching and event in ("open", "socket.connect", "socket.getaddrinfo", "subprocess.Popen"):
        _watching[-1].append(f"{event} {about[1] if event == 'socket.connect' else about[0]}")


# A hook stays as long as the process; it notes nothing unless somebody watches.
sys.addaudithook(_audit)


@contextmanager
def watched(forbidden: Path) -> Iterator[None]:
    """Nothing under `forbidden` or of the system is opened, nobody is called, and no program is started."""
    _watching.append([])
    try:
        yield
    finally:
        seen = _watching.pop()
    places = (str(forbidden), "/etc/passwd", "/proc/self/environ", "/dev/zero", "/dev/stdin")
    bad = [item for item in seen if not item.startswith("open ") or os.path.realpath(item[5:]).startswith(places)]
    assert not bad


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def outside(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What lies beside the folders that may be read: a whole model and texts; and links in them that lead there."""
    outside, roots = tmp_path / "outside", (tmp_path / "data" / "models", tmp_path / "data" / "datasets")
    shutil.copytree(tiny, outside)
    (outside / "secret.txt").write_text(SECRET)
    monkeypatch.setenv("BITFRONTIER_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("BITFRONTIER_MODELS", str(roots[0]))
    # By their form some are ids of the hub, which then is asked for them.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for root in roots:
        root.mkdir(parents=True)
        (root / "linked").symlink_to(outside)
        (root / "linked.txt").symlink_to(outside / "secret.txt")
        (root / "up").symlink_to("..")
        (root / "loop").symlink_to("loop")
    shutil.copytree(tiny, roots[0] / "tiny")
    (roots[1] / "tiny").mkdir()
    (roots[1] / "tiny" / "book.txt").symlink_to(outside / "secret.txt")
    return outside


LINKS = ("linked", "linked.txt", "linked/secret.txt", "up", "up/../outside", "loop", "tiny/book.txt")


def test_no_request_names_what_lies_elsewhere(attacked: TestClient, unharmed: None) -> None:
    def post(model: str, **calibration: str) -> Callable[[], object]:
        body = {"model": model, "budgets": {"avg_bits": 5.25}, "calibration": calibration}
        return lambda: attacked.post("/v1/searches", json=body)

    names = [name for name in ESCAPES if name not in HARMLESS]
    all_refused({name: post(name) for name in names})  # type: ignore[arg-type]
    all_refused({name: post(MODEL, dataset=name) for name in names if name not in ("org/name/more",)})  # type: ignore[arg-type]
    assert attacked.post("/v1/searches", json={"model": "../x", "budgets": {"avg_bits": 5}}).json()["field"] == "model"
    for name in names:
        assert attacked.get("/v1/searches", params={"model": name}).json()["searches"] == []


@pytest.mark.parametrize(
    "under", ["/static/", "/v1/latency-profiles/", "/searches/1/sensitivities/", "/v1/searches/1/"]
)
def test_no_path_leads_to_a_file(attacked: TestClient, under: str) -> None:
    names = [*ESCAPES, "../app.py", "../../pyproject.toml", "..%2fapp.py", "%2e%2e%2fapp.py", "live.js/../../app.py"]
    for name in names:
        if name in ("", ".", ".."):
            continue  # Clients leave these out themselves.
        for sent in (quote(name, safe=""), quote(quote(name, safe=""), safe="")):
            answer = attacked.get(under + sent)
            assert 400 <= answer.status_code < 500, sent
            assert "root:" not in answer.text
            assert "import " not in answer.text


@pytest.mark.parametrize("name", [*ESCAPES, *LINKS])
def test_no_source_of_a_model_leads_out_of_the_roots(outside: Path, name: str) -> None:
    for source in (name, HUB + name, str(outside)):
        with watched(outside), pytest.raises(UnsupportedModel) as refused:
            find_model(source)
        assert refused.value.field == "model"
        assert str(outside.parent) not in refused.value.detail


@pytest.mark.parametrize("name", [*ESCAPES, *LINKS, "tiny"])
def test_no_name_of_a_data_set_leads_out_of_its_folder(outside: Path, name: str) -> None:
    with watched(outside), pytest.raises(InvalidCalibration) as refused:
        datasets.load(name)
    assert refused.value.field == "calibration.dataset"
    assert str(outside.parent) not in refused.value.detail


@pytest.mark.parametrize("source", ["../outside", "linked", "/etc/passwd", "file:///etc/passwd", "hub:../outside"])
def test_a_search_of_a_model_that_leads_out_fails_with_the_reason(
    engine: Engine, outside: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITFRONTIER_POOL", "inprocess")
    put_model(engine, "evil", source, None)
    search, _ = create_search(engine, SearchRequest.model_validate({"model": "evil", "budgets": {"avg_bits": 5}}))
    with working(Worker(engine)):
        wait_until(lambda: get_search(engine, search.id).state == "failed", "it fails")
    failed = get_search(engine, search.id)
    assert failed.error is not None
    assert failed.error["type"] == UnsupportedModel("").problem()["type"]
    assert str(outside.parent) not in str(failed.error)
