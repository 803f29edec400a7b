"""Calibration data: three disjoint splits drawn by seed, in the form the model takes, or a refusal that helps."""

from __future__ import annotations

import json
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from search.errors import InvalidCalibration
from search.request import Calibration
from tests import models
from tests.workers.conftest import Loader
from workers import datasets
from workers.calibration import SPLITS, Data, load_data

SMALL = Calibration(samples=6, sequence_length=32)


def calibration(**changes: Any) -> Calibration:
    return Calibration(**(SMALL.model_dump() | changes))


def samples(data: Data, split: str) -> list[tuple[Any, ...]]:
    """Every sample of a split as plain numbers, padding left out."""
    found = []
    for batch in getattr(data, split):
        if "input_ids" in batch:
            rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
            found += [tuple(tokens[mask.bool()].tolist()) for tokens, mask in rows]
        else:
            found += [tuple(image.flatten().tolist()) for image in batch["pixel_values"]]
    return found


def refusal(request: Calibration, loaded: Any) -> dict[str, Any]:
    with pytest.raises(InvalidCalibration) as refused:
        load_data(request, loaded)
    return refused.value.problem()


@pytest.fixture
def digits(datasets_folder: Path) -> tuple[Tensor, Tensor]:
    """The digits that the digit classifiers were not trained on, as the data set "digits"."""
    images, labels = (array[-models.HELD_OUT :] for array in models.digits_arrays())
    np.savez(datasets_folder / "digits.npz", images=images, labels=labels)
    return torch.from_numpy(images), torch.from_numpy(labels)


@pytest.mark.parametrize("name", ["minilm", "tiny_bert", "tiny_llama", "tiny_gpt2"])
class TestPythonDocs:
    def test_splits_have_the_samples_asked_for_and_share_none(self, loaded: Loader, name: str) -> None:
        data = load_data(SMALL, loaded(name))
        splits = [samples(data, split) for split in SPLITS]
        assert list(map(len, splits)) == [6, 6, 6]
        assert len({tokens for split in splits for tokens in split}) == 18
        assert all(len(tokens) <= 32 for split in splits for tokens in split)

    def test_the_seed_decides(self, loaded: Loader, name: str) -> None:
        model = loaded(name)
        first = load_data(SMALL, model)
        assert load_data(SMALL, model).digest == first.digest
        other = load_data(calibration(seed=1), model)
        assert other.digest != first.digest
        assert samples(other, "calibration") != samples(first, "calibration")


def test_a_language_model_reads_running_text_without_padding(loaded: Loader) -> None:
    model = loaded("tiny_llama")
    data = load_data(SMALL, model)
    for batch in (*data.calibration, *data.acceptance, *data.held_out):
        assert batch["input_ids"].shape[1] == 32
        assert batch["attention_mask"].all()
    # The text itself, not its unknown characters.
    known = torch.cat([batch["input_ids"] for batch in data.calibration]) != model.preprocessor.unk_token_id
    assert known.float().mean() > 0.9


def test_an_encoder_reads_pieces_with_their_marks(loaded: Loader) -> None:
    model = loaded("minilm")
    for tokens in samples(load_data(SMALL, model), "calibration"):
        assert tokens[0] == model.preprocessor.cls_token_id
        assert tokens[-1] == model.preprocessor.sep_token_id


@pytest.mark.parametrize("name", ["minilm", "tiny_llama"])
def test_every_sample_to_search_on_is_known_by_the_document_that_it_begins_in(loaded: Loader, name: str) -> None:
    model = loaded(name)
    tokenizer = model.preprocessor
    data = load_data(calibration(samples=24), model)
    told, ends = samples(data, "calibration"), {tokenizer.eos_token_id, tokenizer.sep_token_id}
    assert len(data.documents) == len(told) > len(set(data.documents)) > 1
    for tokens, document in zip(told, data.documents, strict=True):
        whole = tokenizer(datasets.load("python-docs").documents[document], add_special_tokens=False)["input_ids"]
        begins = list(takewhile(lambda token: token not in ends, tokens[1:] if name == "minilm" else tokens))
        assert begins in [whole[start : start + len(begins)] for start in range(len(whole))]


def test_every_image_is_of_its_own(loaded: Loader, digits: tuple[Tensor, Tensor]) -> None:
    data = load_data(calibration(dataset="digits"), loaded("digits_vit"))
    assert len(set(data.documents)) == 6


def test_labels_stay_with_their_texts(loaded: Loader, datasets_folder: Path) -> None:
    rows = [{"text": f"number {number}", "label": number} for number in range(18)]
    (datasets_folder / "numbers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = loaded("minilm")
    data = load_data(calibration(dataset="numbers"), model)
    for batch in (*data.calibration, *data.acceptance, *data.held_out):
        texts = model.preprocessor.batch_decode(batch["input_ids"], skip_special_tokens=True)
        assert texts == [f"number {label}" for label in batch["labels"].tolist()]


@pytest.mark.parametrize("name", ["digits_vit", "digits_resnet"])
def test_model_ready_arrays_are_taken_as_they_are(loaded: Loader, digits: tuple[Tensor, Tensor], name: str) -> None:
    data = load_data(calibration(dataset="digits"), loaded(name))
    images, labels = digits
    for batch in (*data.calibration, *data.acceptance, *data.held_out):
        for image, label in zip(batch["pixel_values"], batch["labels"], strict=True):
            (match,) = (images == image).flatten(1).all(1).nonzero()[0]
            assert labels[match] == label
    assert len({image for split in SPLITS for image in samples(data, split)}) == 3 * 6


@pytest.mark.parametrize("form", ["bytes", "pictures"])
def test_raw_images_go_through_the_models_own_processor(
    loaded: Loader, digits: tuple[Tensor, Tensor], datasets_folder: Path, form: str
) -> None:
    raw = ((digits[0][:18, 0, ::2, ::2] + 1) * 127.5).round().byte().numpy()
    if form == "bytes":
        np.savez(datasets_folder / "raw.npz", images=raw[..., None])
    else:
        (datasets_folder / "raw").mkdir()
        for number, image in enumerate(raw):
            Image.fromarray(image).save(datasets_folder / "raw" / f"{number:02}.png")
    data = load_data(calibration(dataset="raw"), loaded("digits_vit"))
    for batch in data.calibration:
        distance = (batch["pixel_values"].unsqueeze(1) - digits[0][:18]).abs().amax((2, 3, 4))
        assert (distance.amin(1) < 0.01).all()


class Counting:
    """A tokenizer or image processor that counts what it is given."""

    def __init__(self, preprocessor: Any) -> None:
        self._preprocessor = preprocessor
        self.calls = 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        return self._preprocessor(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._preprocessor, name)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_bert", "digits_vit"])
def test_of_a_large_data_set_only_as_much_is_prepared_as_is_needed(
    loaded: Loader, datasets_folder: Path, name: str
) -> None:
    rows = [{"text": f"{number} " * 20} for number in range(2000)]
    (datasets_folder / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    np.savez(datasets_folder / "image.npz", images=np.zeros((2000, 8, 8, 1), dtype=np.uint8))
    model = loaded(name)
    model.preprocessor = Counting(model.preprocessor)
    load_data(calibration(dataset="text" if model.is_text else "image", samples=2), model)
    assert 0 < model.preprocessor.calls <= (100 if model.is_text else 6)


class TestRefusals:
    @pytest.mark.parametrize("name", ["tiny_llama", "tiny_bert"])
    def test_too_short_a_text_says_how_much_it_gives(self, loaded: Loader, datasets_folder: Path, name: str) -> None:
        (datasets_folder / "note.txt").write_text("word " * 80)
        problem = refusal(calibration(dataset="note"), loaded(name))
        assert "'note' is too short" in problem["detail"]
        assert (problem["field"], problem["value"]) == ("calibration.samples", 6)
        most = int(problem["accepted"].removeprefix("at most "))
        assert 2 <= most < 6
        load_data(calibration(dataset="note", samples=most), loaded(name))

    def test_a_text_that_gives_nothing(self, loaded: Loader, datasets_folder: Path) -> None:
        (datasets_folder / "note.txt").write_text("word")
        problem = refusal(calibration(dataset="note"), loaded("tiny_llama"))
        assert "larger data set" in problem["accepted"]

    def test_too_few_images(self, loaded: Loader, digits: tuple[Tensor, Tensor]) -> None:
        problem = refusal(calibration(dataset="digits", samples=models.HELD_OUT), loaded("digits_vit"))
        assert problem["accepted"] == f"at most {models.HELD_OUT // 3}"

    def test_sequences_longer_than_the_model_takes(self, loaded: Loader) -> None:
        problem = refusal(calibration(sequence_length=512 + 1), loaded("minilm"))
        assert problem["field"] == "calibration.sequence_length"
        assert (problem["value"], problem["accepted"]) == (513, "at most 512")

    def test_text_for_an_image_model_and_images_for_a_text_model(
        self, loaded: Loader, digits: tuple[Tensor, Tensor]
    ) -> None:
        for dataset, name, accepted in (("python-docs", "digits_vit", "images"), ("digits", "tiny_bert", "text")):
            problem = refusal(calibration(dataset=dataset), loaded(name))
            assert (problem["field"], problem["value"]) == ("calibration.dataset", dataset)
            assert problem["accepted"] == accepted

    def test_an_image_model_has_no_default(self, loaded: Loader) -> None:
        problem = refusal(SMALL, loaded("digits_vit"))
        assert problem["field"] == "calibration.dataset"
        assert "folder" in problem["accepted"]

    def test_raw_images_without_a_processor(self, loaded: Loader, datasets_folder: Path) -> None:
        np.savez(datasets_folder / "raw.npz", images=np.zeros((18, 8, 8, 1), dtype=np.uint8))
        model = loaded("digits_vit")
        model.preprocessor = None
        problem = refusal(calibration(dataset="raw"), model)
        assert "preprocessor_config.json" in problem["detail"]
        assert ".npz" in problem["accepted"]

    def test_arrays_that_the_model_does_not_take(self, loaded: Loader, datasets_folder: Path) -> None:
        np.savez(datasets_folder / "colour.npz", images=np.zeros((18, 3, 16, 16), dtype=np.float32))
        problem = refusal(calibration(dataset="colour"), loaded("digits_vit"))
        assert "does not take the samples of 'colour' (pixel_values 3×16×16)" in problem["detail"]

    @pytest.mark.parametrize("label", [10, 12, -1])
    def test_a_label_that_is_none_of_the_models_classes(
        self, loaded: Loader, datasets_folder: Path, label: int
    ) -> None:
        labels = np.arange(18) % 10
        labels[4] = label
        images = models.digits_arrays()[0][:18]
        np.savez(datasets_folder / "labelled.npz", images=images, labels=labels)
        problem = refusal(calibration(dataset="labelled"), loaded("digits_vit"))
        assert (problem["field"], problem["value"]) == ("calibration.dataset", "labelled")
        assert f"the label {label}, and this ViTForImageClassification has 10 classes" in problem["detail"]
        assert "from 0 to 9" in problem["accepted"]

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_an_image_that_is_not_finite(self, loaded: Loader, datasets_folder: Path, value: float) -> None:
        images = models.digits_arrays()[0][:18].copy()
        images[7, 0, 2, 2] = value
        np.savez(datasets_folder / "broken.npz", images=images)
        problem = refusal(calibration(dataset="broken"), loaded("digits_vit"))
        assert (problem["field"], problem["value"]) == ("calibration.dataset", "broken")
        assert "image 7 of 'broken'" in problem["detail"]

    def test_a_damaged_picture(self, loaded: Loader, datasets_folder: Path) -> None:
        (datasets_folder / "album").mkdir()
        for number in range(18):
            (datasets_folder / "album" / f"{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        assert (
            "an image of 'album' cannot be read"
            in refusal(calibration(dataset="album"), loaded("digits_vit"))["detail"]
        )
