import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
)

from tests import models


@pytest.mark.parametrize("train", [models.digits_vit, models.digits_resnet])
def test_digit_classifiers_read_digits_they_have_not_seen(train, tmp_path):
    folder = train(tmp_path)
    assert (folder / "model.safetensors").exists()
    images, labels = models.digits_arrays()
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(pixel_values=torch.from_numpy(images[-models.HELD_OUT :])).logits
    assert (logits.argmax(dim=1).numpy() == labels[-models.HELD_OUT :]).mean() > 0.9


def test_digits_are_what_the_saved_processor_makes_of_a_picture(tmp_path):
    processor = AutoImageProcessor.from_pretrained(models.digits_resnet(tmp_path))
    images, labels = models.digits_arrays()
    assert images.shape == (1797, 1, 16, 16)
    assert images.dtype == np.float32
    assert set(labels) == set(range(10))
    # 8 × 8 pictures of 8 bits, as a person would hand them over.
    pictures = [((image[0, ::2, ::2, None] + 1) * 127.5).round().astype(np.uint8) for image in images[:5]]
    processed = processor(pictures, return_tensors="np", input_data_format="channels_last")["pixel_values"]
    np.testing.assert_allclose(processed, images[:5], atol=1 / 127)


def test_training_is_repeatable():
    first, second = models.trained_resnet(), models.trained_resnet.__wrapped__()
    assert first is not second
    for name, tensor in second.state_dict().items():
        torch.testing.assert_close(first.state_dict()[name], tensor, rtol=0, atol=0)


def test_minilm_embeds_alike_what_means_alike():
    folder = models.minilm()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(
        ["A cat sits on the mat.", "A kitten is lying on the rug.", "The stock market fell on Monday."],
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    embedded = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    similarity = embedded @ embedded.T
    assert similarity[0, 1] > 0.5 > 0.3 > similarity[0, 2]


def test_efficientnet_has_its_imagenet_weights():
    model, preprocess = models.efficientnet_lite0()
    picture = np.zeros((1, 3, 224, 224), dtype=np.float32)
    # A bright disc on blue: trained weights are sure that some round thing is meant, random ones are not.
    row, column = np.mgrid[:224, :224]
    disc = (row - 112) ** 2 + (column - 112) ** 2 < 70**2
    picture[0, 2] = 0.6
    picture[0, :, disc] = (1.0, 0.55, 0.1)
    with torch.no_grad():
        probabilities = model(preprocess(picture)).softmax(dim=1)[0]
    assert probabilities.shape == (1000,)
    assert probabilities.max() > 0.1
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(4.65e6, rel=0.01)


@pytest.mark.parametrize(
    ("build", "auto", "width"),
    [
        (models.tiny_llama, AutoModelForCausalLM, models.VOCABULARY),
        (models.tiny_moe, AutoModelForCausalLM, models.VOCABULARY),
        (models.tiny_gpt2, AutoModelForCausalLM, models.VOCABULARY),
        (models.tiny_bert, AutoModel, 64),
    ],
)
def test_tiny_models_load_with_their_tokenizer(build, auto, width, tmp_path):
    folder = build(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["Bits, layers", "and more bits"], padding=True, return_tensors="pt")
    assert batch["input_ids"][0, 0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id not in batch["input_ids"]
    with torch.no_grad():
        output = auto.from_pretrained(folder).eval()(**batch)
    assert output[0].shape == (*batch["input_ids"].shape, width)
    assert torch.isfinite(output[0]).all()


def test_smollm2_is_none_until_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("BITFRONTIER_TEST_MODELS", str(tmp_path))
    assert models.smollm2() is None


@pytest.mark.slow
def test_smollm2_is_fetched_once(tmp_path, monkeypatch):
    monkeypatch.setenv("BITFRONTIER_TEST_MODELS", str(tmp_path))
    fetch = [sys.executable, "scripts/fetch_models.py"]
    subprocess.run(fetch, check=True, env=os.environ)
    file = models.smollm2()
    assert file is not None
    written = file.stat().st_mtime_ns
    subprocess.run(fetch, check=True, env=os.environ)
    assert file.stat().st_mtime_ns == written
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert len(GGUFReader(file).tensors) == 272
