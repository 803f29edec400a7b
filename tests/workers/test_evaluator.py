"""An evaluator measures what an allocation costs in loss, and always gives the original weights back bit for bit."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from search.errors import UnsupportedModel
from search.inventory import Inventory
from search.request import Calibration
from search.scheme import FULL_PRECISION, Scheme
from tests import models
from tests.workers.conftest import Loader, ModelFolder
from workers.calibration import Data, load_data
from workers.evaluator import Evaluator, EvaluatorSpec, describe_model
from workers.kernels.linear import QuantLinear
from workers.models import LoadedModel, load_model
from workers.quantizers import choose_grid, round_to_grid
from workers.quantizers.activation import round_activation

SMALL = Calibration(samples=4, sequence_length=24)
W4, W8A8 = Scheme.parse("w4a16g32"), Scheme.parse("w8a8")


def evaluator(loaded: Loader, name: str, quantizer: str = "rtn") -> Evaluator:
    model = loaded(name)
    return Evaluator(model, load_data(SMALL, model), quantizer)


@pytest.fixture
def vit_data() -> Data:
    images = torch.from_numpy(models.digits_arrays()[0][-4:])
    batch = {"pixel_values": images}
    return Data([batch], [batch], [batch], "digits")


def uniform(evaluator: Evaluator, text: str, kinds: tuple[str, ...] = ("linear", "conv")) -> dict[str, Scheme]:
    scheme = Scheme.parse(text)
    return {
        name: scheme
        for name, weighted in evaluator.layers.items()
        if weighted.layer.kind in kinds and scheme.fits(weighted.layer.columns)
    }


def state(evaluator: Evaluator) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in evaluator.loaded.model.state_dict().items()}


def assert_same(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert before.keys() == after.keys()
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert changed == []


@contextmanager
def counted_roundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    names: list[str] = []
    original = Evaluator.weight

    def weight(self: Evaluator, name: str, scheme: Scheme) -> Tensor:
        names.append(name)
        return original(self, name, scheme)

    with monkeypatch.context() as patched:
        patched.setattr(Evaluator, "weight", weight)
        yield names


@torch.no_grad()
def output(evaluator: Evaluator) -> Tensor:
    return evaluator.loaded(evaluator.batches("held_out")[0])


class TestApply:
    @pytest.mark.parametrize("name", ["minilm", "tiny_llama", "tiny_gpt2", "tiny_moe"])
    def test_weights_come_back_bit_for_bit(self, loaded: Loader, name: str) -> None:
        ours = evaluator(loaded, name)
        before, original = state(ours), output(ours)
        allocation = uniform(ours, "w3a16g32", ("linear", "embedding", "experts"))
        assert len(allocation) >= len(ours.layers) - 1
        ours.apply(allocation)
        for layer in allocation:
            parameter = ours.layers[layer].parameter
            assert not torch.equal(parameter, ours._originals[layer])
        assert not torch.equal(output(ours), original)
        ours.apply({})
        assert_same(before, state(ours))
        assert torch.equal(output(ours), original)

    @pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_moe"])
    def test_a_layer_holds_what_its_quantizer_gives(self, loaded: Loader, name: str) -> None:
        ours = evaluator(loaded, name, "mse")
        ours.apply(uniform(ours, "w4a16g32", ("linear", "experts")))
        for weighted in ours.layers.values():
            if weighted.layer.kind == "embedding":
                continue
            original = ours._originals[weighted.layer.name]
            matrix = weighted.matrix(original)
            expected = round_to_grid(matrix, choose_grid(matrix, W4, "mse"), W4)
            assert torch.equal(weighted.matrix(weighted.parameter), expected)
            error = ours.rounding_error(weighted.layer.name, W4)
            assert error == pytest.approx(float((expected - matrix).double().square().sum()))

    def test_only_what_changes_is_rounded(self, loaded: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
        ours = evaluator(loaded, "tiny_llama")
        first, second, third = list(uniform(ours, "w4a16g32"))[:3]
        ours.apply({first: W4, second: W4})
        with counted_roundings(monkeypatch) as rounded:
            ours.apply({first: W4, second: FULL_PRECISION, third: W4})
            assert sorted(rounded) == sorted([second, third])
            rounded.clear()
            ours.apply({first: W4, third: W4})
            assert rounded == []

    def test_the_order_of_allocations_does_not_matter(self, loaded: Loader) -> None:
        ours = evaluator(loaded, "tiny_llama")
        fine, coarse = uniform(ours, "w8a16"), uniform(ours, "w2a8")
        ours.apply(fine)
        direct = output(ours)
        ours.apply(coarse)
        ours.apply(fine)
        assert torch.equal(output(ours), direct)

    def test_weights_come_back_after_a_failure_in_the_model(self, loaded: Loader) -> None:
        ours = evaluator(loaded, "tiny_llama")
        before = state(ours)
        last = list(ours.layers.values())[-1].module

        def fail(*_: object) -> None:
            raise ZeroDivisionError

        hook = last.register_forward_hook(fail)
        with pytest.raises(ZeroDivisionError):
            ours.measure(uniform(ours, "w4a16g32"))
        hook.remove()
        assert ours.measure({})["loss"] == pytest.approx(0, abs=1e-6)
        assert_same(before, state(ours))

    def test_weights_come_back_after_an_allocation_that_cannot_be(self, loaded: Loader) -> None:
        ours = evaluator(loaded, "tiny_llama")
        before = state(ours)
        for _ in range(3):
            with pytest.raises(KeyError):
                ours.apply(uniform(ours, "w4a16g32") | {"no.such.layer": W4})
            ours.apply({})
            assert_same(before, state(ours))

    def test_a_tied_head_is_rounded_with_its_embedding(self, loaded: Loader) -> None:
        ours = evaluator(loaded, "tiny_gpt2")
        model = ours.loaded.model
        ours.apply({"transformer.wte": W4})
        assert model.lm_head.weight is model.transformer.wte.weight
        assert len(model.lm_head.weight[0, :32].unique()) <= 16
        assert ours.measure({"transformer.wte": W4})["loss"] > 0

    def test_both_layers_of_fused_experts_count(self, loaded: Loader) -> None:
        ours = evaluator(loaded, "tiny_moe")
        experts = "model.layers.0.mlp.experts"
        losses = [ours.measure({f"{experts}.{leaf}": Scheme(2)})["loss"] for leaf in ("gate_up_proj", "down_proj")]
        assert min(losses) > 0


def cut(evaluator: Evaluator, *cycle: Scheme, channels: int = 24) -> dict[str, Scheme]:
    """Schemes dealt out to groups of the output channels of all linear layers, in turn."""
    layers = [weighted.layer for weighted in evaluator.layers.values() if weighted.layer.kind == "linear"]
    parts = [
        layer.part(range(start, min(start + channels, layer.rows)))
        for layer in layers
        for start in range(0, layer.rows, channels)
    ]
    return {part.name: cycle[index % len(cycle)] for index, part in enumerate(parts)}


class TestPartsOfLayers:
    """Some output channels of a linear layer, such as `model.head[0:128]`; GPT-2 stores them as columns."""

    @pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_bert", "digits_vit"])
    @pytest.mark.parametrize("quantizer", ["rtn", "mse"])
    def test_a_layer_is_put_together_from_what_its_parts_would_be_in_whole_layers(
        self, loaded: Loader, vit_data: Data, name: str, quantizer: str
    ) -> None:
        model = loaded(name)
        ours = Evaluator(model, load_data(SMALL, model) if model.is_text else vit_data, quantizer)
        before, original = state(ours), output(ours)
        coarse, fine = Scheme.parse("w3a16g32asym"), Scheme.parse("w6a16")
        allocation = cut(ours, coarse, FULL_PRECISION, fine)
        ours.apply(allocation)
        for text, scheme in allocation.items():
            part = ours.layers[text]
            whole = ours.layers[text.partition("[")[0]]
            rows = part.channels
            now, alone = whole.matrix(whole.weight)[rows], whole.matrix(ours.weight(whole.layer.name, scheme))[rows]
            assert torch.equal(now, alone)
            assert torch.equal(part.matrix(part.weight), alone)
            error = whole.matrix(ours.rounding(whole.layer.name, scheme))[rows]
            assert torch.equal(part.matrix(ours.rounding(text, scheme)), error)
            assert ours.rounding_error(text, scheme) == pytest.approx(float(error.double().square().sum()))
        assert not torch.equal(output(ours), original)
        ours.apply({})
        assert_same(before, state(ours))
        assert torch.equal(output(ours), original)

    def test_parts_at_one_scheme_are_the_layer_at_that_scheme(self, loaded: Loader) -> None:
        ours = evaluator(loaded, "tiny_gpt2")
        parts, whole = cut(ours, W4), dict.fromkeys(cut(ours, W4, channels=1000), W4)
        ours.apply(parts)
        found = output(ours)
        ours.apply({name.partition("[")[0]: scheme for name, scheme in whole.items()})
        assert torch.equal(output(ours), found)
        assert ours.measure(parts) == ours.measure({name.partition("[")[0]: W4 for name in whole})

    def test_the_order_of_allocations_does_not_matter(self, loaded: Loader) -> None:
        ours = evaluator(loaded, "tiny_llama")
        first, second = cut(ours, W4, FULL_PRECISION), cut(ours, FULL_PRECISION, Scheme(2), channels=40)
        ours.apply(first)
        direct = output(ours)
        for between in (second, uniform(ours, "w2a8"), {}):
            ours.apply(between)
            with ours.full_precision():
                assert ours.measure({})["loss"] == pytest.approx(0, abs=1e-6)
            ours.apply(first)
            assert torch.equal(output(ours), direct)

    @pytest.mark.parametrize(
        ("part", "error", "told"),
        [
            ("no.such.layer[0:8]", KeyError, "no.such.layer"),
            ("model.layers.0.mlp.up_proj[0:10000]", ValueError, "has no part"),
            ("model.embed_tokens[0:8]", ValueError, "has no part"),
        ],
    )
    def test_a_part_that_is_none_is_refused(self, loaded: Loader, part: str, error: type[Exception], told: str) -> None:
        ours = evaluator(loaded, "tiny_llama")
        before = state(ours)
        with pytest.raises(error, match=told):
            ours.apply({part: W4})
        ours.apply({})
        assert_same(before, state(ours))

    def test_a_part_has_no_input_to_round(self, loaded: Loader) -> None:
        ours = evaluator(loaded, "tiny_llama")
        with pytest.raises(ValueError, match="whose one input w8a8 would quantize"):
            ours.apply({"model.layers.0.mlp.up_proj[0:8]": W8A8})


class TestMeasure:
    @pytest.mark.parametrize("name", ["minilm", "tiny_bert", "tiny_llama", "tiny_gpt2", "tiny_moe"])
    def test_full_precision_loses_nothing(self, loaded: Loader, name: str) -> None:
        ours = evaluator(loaded, name)
        metrics = ours.measure({})
        assert 0 <= metrics["loss"] <= 1e-6
        assert 0 <= metrics["loss_stderr"] <= 1e-6
        assert ("perplexity" in metrics) == (ours.loaded.task == "causal-lm")

    def test_more_bits_lose_less(self, loaded: Loader) -> None:
        ours = evaluator(loaded, "minilm")
        losses = [ours.measure(uniform(ours, f"w{bits}a16g64"))["loss"] for bits in (3, 4, 5, 6, 8)]
        assert losses == sorted(losses, reverse=True)
        # A bit is worth 6 dB where nothing saturates.
        assert losses[-2] / losses[-1] == pytest.approx(16, rel=0.3)
        assert losses[0] > 100 * losses[-1]

    def test_loss_is_one_minus_the_cosine(self, loaded: Loader) -> None:
        ours = evaluator(loaded, "minilm")
        (batch,) = ours.batches("held_out")
        allocation = uniform(ours, "w4a16g64")
        with torch.no_grad():
            reference = ours.loaded(batch)
            ours.apply(allocation)
            cosine = torch.nn.functional.cosine_similarity(ours.loaded(batch), reference, dim=-1)
        measured = ours.measure(allocation)
        assert measured["loss"] == pytest.approx(float((1 - cosine).mean()), rel=1e-3)
        assert measured["loss_stderr"] == pytest.approx(float(cosine.std() / math.sqrt(len(cosine))), rel=1e-3)

    def test_perplexity_is_the_libraries_own(self, loaded: Loader) -> None:
        ours = evaluator(loaded, "tiny_llama")
        with torch.no_grad():
            losses = [
                ours.loaded.model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
                for batch in ours.batches("held_out")
            ]
        assert ours.measure({})["perplexity"] == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-5)

    @pytest.mark.parametrize("name", ["digits_vit", "digits_resnet"])
    def test_accuracy_is_that_of_the_classifier(self, loaded: Loader, datasets_folder: Path, name: str) -> None:
        images, labels = (array[-models.HELD_OUT :] for array in models.digits_arrays())
        np.savez(datasets_folder / "digits.npz", images=images, labels=labels)
        model = loaded(name)
        data = load_data(Calibration(dataset="digits", samples=100), model)
        ours = Evaluator(model, data)
        metrics = ours.measure({})
        assert metrics["accuracy"] > 0.85
        correct = sum(int((model(batch).argmax(-1) == batch["labels"]).sum()) for batch in data.held_out)
        assert metrics["accuracy"] == pytest.approx(correct / 100)
        ruined = ours.measure(uniform(ours, "w2a4"))
        assert ruined["loss"] > metrics["loss"]
        assert ruined["accuracy"] < metrics["accuracy"]

    def test_convolutions_of_an_imagenet_model(self) -> None:
        network, preprocess = models.efficientnet_lite0()
        images = np.random.default_rng(0).random((4, 3, 64, 64), dtype=np.float32)
        batches = [{"pixel_values": preprocess(images[:2])}], [{"pixel_values": preprocess(images[2:])}]
        loaded = LoadedModel(network, "image-classification", "EfficientNet", digest="x")
        ours = Evaluator(loaded, Data(*batches, batches[1], digest="y"))
        assert len(ours.layers) == 50
        assert ours.chain is not None
        before = state(ours)
        losses = [ours.measure(uniform(ours, text))["loss"] for text in ("w4a16", "w6a16", "w8a16")]
        assert losses == sorted(losses, reverse=True)
        assert ours.measure(uniform(ours, "w8a8"))["loss"] > losses[-1] > 0
        ours.apply({})
        assert_same(before, state(ours))

    def test_a_model_whose_output_is_not_finite_is_refused(self, loaded: Loader) -> None:
        model = loaded("tiny_llama")
        data = load_data(SMALL, model)
        model.model.model.norm.weight.data[0] = float("nan")  # type: ignore[union-attr]
        with pytest.raises(UnsupportedModel, match="output of this LlamaForCausalLM is not finite"):
            Evaluator(model, data).measure({})


class TestActivations:
    def test_the_layers_own_input_is_rounded_and_no_others(self, loaded: Loader) -> None:
        ours = evaluator(loaded, "tiny_bert")
        chosen = "encoder.layer.1.intermediate.dense"
        seen: dict[str, Tensor] = {}
        for name in uniform(ours, "w8a8"):
            ours.layers[name].module.register_forward_hook(
                lambda _module, inputs, _output, name=name: seen.update({name: inputs[0]})
            )
        output(ours)
        plain = dict(seen)
        for bits in (8, 6, 4):
            ours.apply({chosen: Scheme(8, bits)})
            output(ours)
            assert torch.equal(seen[chosen], round_activation(plain[chosen], bits))
            earlier = list(plain)[: list(plain).index(chosen)]
            assert len(earlier) >= 6
            assert all(torch.equal(seen[name], plain[name]) for name in earlier)

    def test_fewer_activation_bits_lose_more(self, loaded: Loader) -> None:
        ours = evaluator(loaded, "minilm")
        losses = [ours.measure(uniform(ours, f"w8a{bits}"))["loss"] for bits in (4, 6, 8, 16)]
        assert losses == sorted(losses, reverse=True)
        assert len(set(losses)) == 4

    def test_weights_stay_and_inputs_are_whole_again_at_full_precision(self, loaded: Loader) -> None:
        ours = evaluator(loaded, "tiny_bert")
        original = output(ours)
        ours.apply(uniform(ours, "w8a4"))
        changed = output(ours)
        assert not torch.equal(changed, original)
        with ours.full_precision():
            assert torch.equal(output(ours), original)
        assert torch.equal(output(ours), changed)


class TestReference:
    @pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_moe", "minilm"])
    def test_it_is_the_full_precision_output_bit_for_bit_whatever_is_applied(self, loaded: Loader, name: str) -> None:
        ours = evaluator(loaded, name)
        assert ours.chain is not None
        direct = [ours.loaded(batch) for batch in ours.batches("calibration")]
        kinds = ("linear", "experts", "embedding")
        for allocation in ({}, uniform(ours, "w2a16g32", kinds), uniform(ours, "w4a4", ("linear",))):
            ours.apply(allocation)
            # Asked twice: computed, and recalled.
            for index, expected in [*enumerate(direct), *enumerate(direct)]:
                assert torch.equal(ours.reference("calibration", index), expected)

    def test_asking_for_it_leaves_the_allocation_in_place(self, loaded: Loader) -> None:
        ours = evaluator(loaded, "tiny_llama")
        ours.apply(uniform(ours, "w3a8"))
        before, rounded = state(ours), output(ours)
        ours.reference("held_out", 0)
        assert_same(before, state(ours))
        assert torch.equal(output(ours), rounded)


def test_an_evaluator_is_built_from_its_spec(model_folder: ModelFolder) -> None:
    spec = EvaluatorSpec(str(model_folder("tiny_llama")), SMALL, "mse")
    first, second = Evaluator.build(spec), Evaluator.build(spec)
    allocation = uniform(first, "w3a8")
    assert first.measure(allocation) == second.measure(allocation)
    assert first.data.digest == second.data.digest
    assert Inventory.from_json(first.inventory.to_json()) == second.inventory


@pytest.mark.parametrize("name", ["minilm", "tiny_llama", "tiny_moe", "digits_vit", "digits_resnet"])
def test_a_model_is_described_without_data_as_with(loaded: Loader, datasets_folder: Path, name: str) -> None:
    np.save(datasets_folder / "digits.npy", models.digits_arrays()[0][:16])
    model = loaded(name)
    described = describe_model(model)
    dataset = None if model.is_text else "digits"
    data = load_data(SMALL.model_copy(update={"dataset": dataset}), model)
    assert Evaluator(model, data).inventory == described
    assert len({layer.block for layer in described.layers} - {None}) >= 2
    assert described.parameters == sum(parameter.numel() for parameter in model.model.parameters())


def test_a_model_that_does_not_take_tokens_is_refused(model_folder: ModelFolder, tmp_path: Path) -> None:
    """A bare ViTModel is named like a text encoder."""
    shutil.copytree(model_folder("tiny_bert"), tmp_path, dirs_exist_ok=True)
    config = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16)
    ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="ViTModel does not run on one token"):
        describe_model(load_model(str(tmp_path), torch.device("cpu")))


class TestThroughKernels:
    """With BITFRONTIER_KERNELS, or on a GPU, candidates are measured through packed weights."""

    @pytest.fixture(params=["tiny_llama", "digits_resnet"])
    def both(
        self, request: pytest.FixtureRequest, loaded: Loader, monkeypatch: pytest.MonkeyPatch
    ) -> tuple[Evaluator, Evaluator]:
        """An evaluator that rounds, and one that multiplies by packed weights."""
        model, other = loaded(request.param), loaded(request.param)
        if model.is_text:
            data = load_data(SMALL, model)
        else:
            images, labels = models.digits_arrays()
            batch = {"pixel_values": torch.from_numpy(images[-64:]), "labels": torch.from_numpy(labels[-64:])}
            data = Data([batch], [batch], [batch], "digits")
        rounding = Evaluator(model, data)
        monkeypatch.setenv("BITFRONTIER_KERNELS", "reference")
        return rounding, Evaluator(other, data)

    @pytest.mark.parametrize("text", ["w4a16", "w6a8", "w8a8"])
    def test_the_loss_is_what_rounding_gives(self, both: tuple[Evaluator, Evaluator], text: str) -> None:
        scheme, (rounding, packed) = Scheme.parse(text), both
        allocation = {
            name: scheme
            for name, layer in packed.layers.items()
            if layer.layer.kind != "embedding" and name != "lm_head"
        }
        expected, found = rounding.measure(allocation), packed.measure(allocation)
        assert found["loss"] == pytest.approx(expected["loss"], rel=5e-3)
        for name in ("perplexity", "accuracy"):
            assert found.get(name, 0) == pytest.approx(expected.get(name, 0), rel=1e-3)

    def test_layers_run_packed_within_and_are_themselves_afterwards(self, both: tuple[Evaluator, Evaluator]) -> None:
        _, packed = both
        name = next(name for name, layer in packed.layers.items() if layer.layer.kind == "linear")
        batch = packed.batches("calibration")[0]
        full = packed.loaded(batch)
        with packed.deployed({name: Scheme(4, 8)}):
            assert isinstance(vars(packed.layers[name].module)["forward"].__self__, QuantLinear)
            rounded = packed.loaded(batch)
            assert not torch.equal(rounded, full)
            with packed.full_precision():
                assert torch.equal(packed.loaded(batch), full)
            assert torch.equal(packed.loaded(batch), rounded)
            with packed.deployed({}):
                assert torch.equal(packed.loaded(batch), full)
            assert isinstance(vars(packed.layers[name].module)["forward"].__self__, QuantLinear)
        packed.apply({})
        assert torch.equal(packed.loaded(batch), full)

    def test_what_the_kernels_cannot_multiply_is_rounded(self, both: tuple[Evaluator, Evaluator]) -> None:
        rounding, packed = both
        name = next(iter(packed.layers))
        scheme = Scheme(2, 16)
        assert packed.measure({name: scheme})["loss"] == pytest.approx(
            rounding.measure({name: scheme})["loss"], rel=1e-4
        )

    def test_after_an_error_the_model_is_whole(self, both: tuple[Evaluator, Evaluator]) -> None:
        _, packed = both
        name = next(name for name, layer in packed.layers.items() if layer.layer.kind == "linear")
        with pytest.raises(ZeroDivisionError), packed.deployed({name: Scheme(4, 8)}):
            _ = 1 / 0
        assert all("forward" not in vars(module) for module in packed.loaded.model.modules())

    def test_a_weight_that_is_not_finite_is_refused_as_without(self, both: tuple[Evaluator, Evaluator]) -> None:
        _, packed = both
        name = next(name for name, layer in packed.layers.items() if layer.layer.kind == "linear")
        with torch.no_grad():
            packed._originals[name][0, 0] = torch.nan
        with pytest.raises(UnsupportedModel, match="not finite"):
            packed.measure({name: Scheme(4, 8)})

    def test_a_layer_of_which_a_part_has_its_own_scheme_is_rounded(self, both: tuple[Evaluator, Evaluator]) -> None:
        rounding, packed = both
        name = next(name for name, layer in packed.layers.items() if layer.layer.kind == "linear")
        allocation = {name: Scheme(3, 8), packed.layers[name].layer.part(range(0, 4)).name: Scheme(8)}
        assert packed.measure(allocation)["loss"] == pytest.approx(rounding.measure(allocation)["loss"], rel=1e-4)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_model_may_ask_for_the_weights_of_its_layers(
        self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A vision transformer takes the type of its first weight; torch's encoder hands weights on."""
        config = ViTConfig(
            hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128, image_size=32,
            patch_size=8, num_channels=4, num_labels=4,
        )  # fmt: skip
        torch.manual_seed(0)
        losses = []
        batch = {"pixel_values": torch.randn(8, 4, 32, 32).to(dtype)}
        model = ViTForImageClassification(config).eval().requires_grad_(False).to(dtype)
        for kernels in (False, True):
            if kernels:
                monkeypatch.setenv("BITFRONTIER_KERNELS", "reference")
            data = Data([batch], [batch], [batch], "images")
            evaluator = Evaluator(LoadedModel(model, "image-classification", "ViT", "digest"), data)
            allocation = {name: Scheme(4, 8) for name in evaluator.layers}
            losses.append(evaluator.measure(allocation)["loss"])
            evaluator.apply({})
        assert losses[1] == pytest.approx(losses[0], rel=0.1)
        assert losses[1] != losses[0]
