"""Loading models: what comes out is the model of its library, and what cannot be loaded is refused with the reason."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    T5Model,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from search.errors import UnsupportedModel
from tests import models
from tests.workers.conftest import Loader, ModelFolder
from tests.workers.gguf_file import write_gguf
from workers.evaluator import describe_model
from workers.models import load_model

CPU = torch.device("cpu")


@pytest.fixture
def copied(model_folder: ModelFolder, tmp_path: Path) -> Path:
    """A copy of the tiny Llama's folder, to spoil."""
    return shutil.copytree(model_folder("tiny_llama"), tmp_path / "spoiled")


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


class TestLoading:
    def test_minilm_gives_the_sentence_embedding_of_its_library(self, loaded: Loader) -> None:
        library = pytest.importorskip("sentence_transformers")
        sentences = ["A cat sits on the mat.", "Bits!", "The stock market fell on Monday, and again on Tuesday."]
        model = loaded("minilm")
        assert (model.task, model.architecture, model.pooling) == ("embedding", "BertModel", "mean")
        batch = dict(model.preprocessor(sentences, padding=True, return_tensors="pt"))
        with torch.no_grad():
            ours = torch.nn.functional.normalize(model(batch), dim=-1)
        theirs = library.SentenceTransformer(str(models.minilm()), device="cpu").encode(
            sentences, convert_to_tensor=True, normalize_embeddings=True
        )
        torch.testing.assert_close(ours, theirs)

    def test_minilm_has_39_layers_in_six_blocks(self, loaded: Loader) -> None:
        inventory = describe_model(loaded("minilm"))
        assert len(inventory.layers) == 39
        assert inventory.layers[0].name == "embeddings.word_embeddings"
        assert len({layer.block for layer in inventory.layers} - {None}) == 6
        # Real weights, of which only biases and normalizations are no layer's.
        assert 22_500_000 < sum(layer.weights for layer in inventory.layers) < inventory.parameters < 22_800_000

    @pytest.mark.parametrize(
        ("name", "task", "architecture"),
        [
            ("tiny_llama", "causal-lm", "LlamaForCausalLM"),
            ("tiny_gpt2", "causal-lm", "GPT2LMHeadModel"),
            ("tiny_moe", "causal-lm", "MixtralForCausalLM"),
            ("tiny_bert", "embedding", "BertModel"),
            ("digits_vit", "image-classification", "ViTForImageClassification"),
            ("digits_resnet", "image-classification", "ResNetForImageClassification"),
        ],
    )
    def test_the_task_follows_from_the_architecture(
        self, loaded: Loader, name: str, task: str, architecture: str
    ) -> None:
        model = loaded(name)
        assert (model.task, model.architecture) == (task, architecture)
        assert not model.model.training
        assert not any(parameter.requires_grad for parameter in model.model.parameters())
        assert {parameter.dtype for parameter in model.model.parameters()} == {torch.float32}
        assert model.preprocessor is not None
        assert describe_model(model).task == task

    def test_a_sequence_classifier(self, model_folder: ModelFolder, tmp_path: Path) -> None:
        shutil.copytree(model_folder("tiny_bert"), tmp_path, dirs_exist_ok=True)
        config = BertConfig(vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_labels=3)
        BertForSequenceClassification(config).save_pretrained(tmp_path)
        model = load_model(str(tmp_path), CPU)
        assert model.task == "sequence-classification"
        batch = dict(model.preprocessor(["good", "bad film"], padding=True, return_tensors="pt"))
        assert model(batch).shape == (2, 3)

    def test_a_gguf_file_gives_the_weights_it_holds(self, model_folder: ModelFolder, tmp_path: Path) -> None:
        original = LlamaForCausalLM.from_pretrained(model_folder("tiny_llama"))
        held = write_gguf(original, tmp_path / "tiny.gguf")
        model = load_model(str(tmp_path / "tiny.gguf"), CPU)
        assert (model.task, model.architecture) == ("causal-lm", "LlamaForCausalLM")
        assert {parameter.dtype for parameter in model.model.parameters()} == {torch.float32}
        original.load_state_dict({name: torch.from_numpy(np.array(weight)) for name, weight in held.items()})
        batch = dict(model.preprocessor("bits", return_tensors="pt"))
        with torch.no_grad():
            torch.testing.assert_close(model(batch), original.eval()(**batch).logits)

    @pytest.mark.slow
    def test_smollm2(self) -> None:
        file = models.smollm2()
        assert file is not None, "run scripts/fetch_models.py"
        inventory = describe_model(load_model(str(file), CPU))
        assert inventory.task == "causal-lm"
        assert len(inventory.layers) == 30 * 7 + 1
        assert inventory.layers[0].aliases == ("lm_head",)

    def test_half_precision_is_that_of_the_library(self, model_folder: ModelFolder) -> None:
        """Weights are halved; what is computed when a model is made, like rotary frequencies, is not."""
        folder = model_folder("tiny_llama")
        ours = load_model(str(folder), CPU, "bfloat16").model
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        assert {name: tensor.dtype for name, tensor in ours.named_buffers()} == {
            name: tensor.dtype for name, tensor in theirs.named_buffers()
        }
        tokens = torch.arange(24)[None] % 50
        with torch.no_grad():
            assert torch.equal(ours(tokens).logits, theirs(tokens).logits)

    @pytest.mark.parametrize(
        ("config", "pooling"),
        [
            ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
            ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
            ({"pooling_mode": "cls"}, "cls"),
            ({"pooling_mode": "mean"}, "mean"),
        ],
    )
    def test_pooling_is_read_as_sentence_transformers_writes_it(
        self, model_folder: ModelFolder, tmp_path: Path, config: dict[str, object], pooling: str
    ) -> None:
        folder = shutil.copytree(model_folder("tiny_bert"), tmp_path / "model")
        bare = load_model(str(folder), CPU)
        assert bare.pooling == "mean"
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
        model = load_model(str(folder), CPU)
        assert model.pooling == pooling
        assert model.digest != bare.digest
        tokens = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
        states = model.model(**tokens).last_hidden_state
        torch.testing.assert_close(model(tokens), states[:, 0] if pooling == "cls" else states.mean(1))

    def test_the_digest_is_the_contents(self, copied: Path, loaded: Loader) -> None:
        original = loaded("tiny_llama").digest
        assert load_model(str(copied.rename(copied.with_name("renamed"))), CPU).digest == original
        weights = copied.with_name("renamed") / "model.safetensors"
        save_file({name: weight + 1e-3 for name, weight in load_file(weights).items()}, weights, {"format": "pt"})
        assert load_model(str(weights.parent), CPU).digest != original

    def test_a_hub_id_is_found_in_the_hubs_cache(self, model_folder: ModelFolder, tmp_path: Path) -> None:
        commit = "0123456789abcdef0123456789abcdef01234567"
        repository = tmp_path / "models--org--tiny"
        shutil.copytree(model_folder("tiny_llama"), repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        program = (
            "import torch\nfrom workers.models import load_model\n"
            "print(load_model('hub:org/tiny', torch.device('cpu')).digest)"
        )
        environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
        found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert found.returncode == 0, found.stderr
        assert found.stdout.split()[-1] == load_model(str(model_folder("tiny_llama")), CPU).digest


def pickled(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def incomplete(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def without_numbers(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def with_code_of_its_own(folder: Path) -> None:
    edit(folder / "config.json", model_type="mystery", auto_map={"AutoConfig": "code.C", "AutoModel": "code.M"})
    (folder / "code.py").write_text("raise SystemExit('remote code ran')")


def odd_pooling(folder: Path) -> None:
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "lasttoken"}')


def replaced(architecture: type, config: object) -> Callable[[Path], None]:
    return lambda folder: architecture(config).save_pretrained(folder)


T5 = T5Config(vocab_size=256, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
WHISPER = WhisperConfig(
    vocab_size=100,
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
)


class TestRefusals:
    @pytest.mark.parametrize(
        ("spoil", "says"),
        [
            (pickled, "no safetensors weights; pytorch_model.bin is a pickle"),
            (lambda folder: (folder / "model.safetensors").unlink(), "no safetensors weights"),
            (truncated, "cannot be loaded"),
            (lambda folder: (folder / "model.safetensors").write_bytes(b"not tensors" * 9), "cannot be loaded"),
            (incomplete, "lacks 1 of its model's tensors, model.layers.1.mlp.up_proj.weight"),
            (lambda folder: edit(folder / "config.json", intermediate_size=64), "cannot be loaded"),
            (lambda folder: (folder / "config.json").unlink(), "no config.json"),
            (lambda folder: (folder / "config.json").write_text("{"), "config.json of spoiled cannot be read"),
            (lambda folder: (folder / "config.json").write_text("[" * 99_999), "config.json of spoiled cannot be read"),
            (lambda folder: (folder / "config.json").write_text("[1]"), "it is no JSON object"),
            (lambda folder: edit(folder / "config.json", model_type="mystery"), "mystery"),
            (lambda folder: edit(folder / "config.json", num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
            (lambda folder: edit(folder / "config.json", num_labels=10**9), "num_labels is 1000000000"),
            (lambda folder: edit(folder / "config.json", hidden_size=2**20), "its configuration describes"),
            (with_code_of_its_own, "asks for code of its own (auto_map in config.json)"),
            (
                lambda folder: edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.T", None]}),
                "asks for code of its own (auto_map in tokenizer_config.json)",
            ),
            (
                lambda folder: edit(folder / "config.json", attn_implementation="org/attention"),
                "asks for code of its own (attn_implementation in config.json)",
            ),
            (without_numbers, "1 of the tensors of spoiled hold values that are not finite, model.norm.weight among"),
            (lambda folder: torch.save({"a": torch.ones(2)}, folder / "model.safetensors"), "it is a zip archive"),
            (lambda folder: (folder / "model.safetensors").write_bytes(pickle.dumps({"a": 1})), "it is a pickle"),
            (lambda folder: (folder / "model.safetensors").write_bytes(b""), "it is empty"),
            (
                lambda folder: edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
                "quantized already",
            ),
            (without_tokenizer, "tokenizer of spoiled cannot be loaded"),
            (
                lambda folder: (folder / "tokenizer.json").write_text('{"model": 1}'),
                "tokenizer of spoiled cannot be loaded",
            ),
            (odd_pooling, "pools its token states"),
            (replaced(T5ForConditionalGeneration, T5), "T5ForConditionalGeneration of spoiled has no task"),
            (replaced(T5Model, T5), "T5Model of spoiled has no task"),
            (replaced(WhisperForConditionalGeneration, WHISPER), "WhisperForConditionalGeneration of spoiled"),
        ],
    )
    def test_a_folder_that_cannot_be_loaded(self, copied: Path, spoil: Callable[[Path], object], says: str) -> None:
        spoil(copied)
        with pytest.raises(UnsupportedModel) as refused:
            load_model(str(copied), CPU)
        problem = refused.value.problem()
        assert says in problem["detail"]
        assert problem["field"] == "model"
        assert problem["value"]
        # Where a model lies on the server is nobody's business.
        assert str(copied.parent) not in json.dumps(problem["value"])

    def test_beside_safetensors_a_pickle_is_not_read(self, copied: Path, loaded: Loader) -> None:
        (copied / "pytorch_model.bin").write_bytes(b"not even a pickle")
        (copied / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
        (copied / "code.py").write_text("raise SystemExit('code ran')")
        assert load_model(str(copied), CPU).digest == loaded("tiny_llama").digest

    @pytest.mark.parametrize("source", ["org/no-such-model", "/no/such/folder", "weights.bin"])
    def test_what_is_nowhere(self, source: str, tmp_path: Path) -> None:
        program = (
            "import sys, torch\n"
            "from search.errors import UnsupportedModel\n"
            "from workers.models import load_model\n"
            "try:\n    load_model('hub:' + sys.argv[1], torch.device('cpu'))\n"
            "except UnsupportedModel as error:\n    print(error.detail, '|', error.field, error.value, error.accepted)"
        )
        environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
        said = subprocess.run([sys.executable, "-c", program, source], env=environment, capture_output=True, text=True)
        assert f"'{source}' is neither a registered model nor one that can be fetched" in said.stdout, said.stderr
        assert f"| model {source} a registered name" in said.stdout
