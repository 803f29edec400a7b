"""Layers with packed weights give what the evaluator's fake quantisation stands for, and leave no trace."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from search.request import Calibration
from search.scheme import FULL_PRECISION, Scheme
from tests import models
from tests.workers.conftest import Loader
from workers.calibration import Data, load_data
from workers.evaluator import Evaluator
from workers.kernels.errors import KernelError
from workers.kernels.linear import QuantConv2d, QuantLinear, pack_rounded, refusal, swapped
from workers.kernels.reference import dequantize
from workers.loss import next_token_loss
from workers.models import LoadedModel, load_model
from workers.quantizers import QUANTIZERS, choose_grid, round_to_grid
from workers.quantizers.activation import round_activation

pytestmark = pytest.mark.long

every_scheme = pytest.mark.parametrize("text", ["w4a16g64", "w6a8", "w8a8", "w3a4g32", "w5a6g128"])


def faked(matrix: Tensor, scheme: Scheme, quantizer: str = "rtn") -> Tensor:
    """The oracle: the weight as the evaluator rounds it."""
    return round_to_grid(matrix, choose_grid(matrix, scheme, quantizer), scheme)


def rounded(x: Tensor, scheme: Scheme, token_dims: int = 1) -> Tensor:
    return round_activation(x, scheme.activation_bits, token_dims) if scheme.quantizes_activations else x


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


class TestWeight:
    @every_scheme
    @pytest.mark.parametrize("quantizer", sorted(QUANTIZERS))
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_is_the_one_that_the_evaluator_measures(self, text: str, quantizer: str, dtype: torch.dtype) -> None:
        scheme = Scheme.parse(text)
        matrix = torch.randn(24, 256, generator=torch.Generator().manual_seed(0)).pow(3).to(dtype)
        matrix[3] = 0
        packed = pack_rounded(matrix, scheme, quantizer)
        assert torch.equal(dequantize(packed).to(dtype), faked(matrix, scheme, quantizer))

    def test_that_is_not_finite_is_refused(self) -> None:
        with pytest.raises(KernelError, match="nan"):
            pack_rounded(torch.full((4, 64), torch.nan), Scheme(4), "rtn")


class TestLinear:
    @every_scheme
    @torch.no_grad()
    def test_gives_what_rounded_weights_and_activations_give(self, text: str) -> None:
        scheme, x = Scheme.parse(text), torch.randn(2, 7, 128)
        linear = seeded(lambda: nn.Linear(128, 40))
        expected = functional.linear(rounded(x, scheme), faked(linear.weight, scheme), linear.bias)
        torch.testing.assert_close(QuantLinear.from_linear(linear, scheme, "rtn")(x), expected, rtol=1e-5, atol=1e-5)

    @every_scheme
    @torch.no_grad()
    def test_stored_inputs_first_gives_the_same(self, text: str) -> None:
        scheme, x = Scheme.parse(text), torch.randn(2, 7, 128)
        transposed = seeded(lambda: Conv1D(40, 128))
        expected = rounded(x, scheme) @ faked(transposed.weight.T, scheme).T + transposed.bias
        found = QuantLinear.from_linear(transposed, scheme, "rtn")(x)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_takes_a_grid_of_ones_own(self) -> None:
        linear, scheme = nn.Linear(64, 8), Scheme(4, 8, 32)
        grid = choose_grid(linear.weight.detach(), scheme, "mse")
        found = QuantLinear.from_linear(linear, scheme, grid)
        assert torch.equal(dequantize(found.packed), faked(linear.weight.detach(), scheme, "mse"))

    def test_is_unchanged_by_another_type(self) -> None:
        linear = QuantLinear.from_linear(nn.Linear(64, 8), Scheme(6, 8), "rtn")
        weight = dequantize(linear.packed)
        assert torch.equal(dequantize(linear.to(torch.bfloat16).packed), weight)
        assert linear(torch.randn(3, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16

    def test_comes_back_from_its_state(self) -> None:
        first, second = (QuantLinear.from_linear(nn.Linear(64, 8), Scheme(5), "rtn") for _ in range(2))
        second.load_state_dict(first.state_dict())
        x = torch.randn(3, 64)
        assert torch.equal(first(x), second(x))


class TestConvolution:
    @every_scheme
    @pytest.mark.parametrize(
        "geometry",
        [
            {"kernel_size": 1},
            {"kernel_size": 3, "padding": 1, "stride": 2},
            {"kernel_size": (3, 5), "padding": (0, 3), "stride": (1, 2), "dilation": (2, 1), "bias": False},
        ],
    )
    @torch.no_grad()
    def test_gives_what_rounded_weights_and_images_give(self, text: str, geometry: dict[str, object]) -> None:
        scheme = Scheme.parse(text)
        convolution = seeded(lambda: nn.Conv2d(128, 24, **geometry))
        images = torch.randn(3, 128, 9, 11) * torch.tensor([0.1, 1, 30]).view(3, 1, 1, 1)
        weight = faked(convolution.weight.flatten(1), scheme).view_as(convolution.weight)
        plain = seeded(lambda: nn.Conv2d(128, 24, **geometry))
        plain.weight.copy_(weight)
        expected = plain(rounded(images, scheme, 3))
        found = QuantConv2d.from_convolution(convolution, scheme, "rtn")(images)
        assert found.is_contiguous()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("text", ["w4a16", "w6a8"])
    @torch.no_grad()
    def test_takes_one_image_and_none(self, text: str) -> None:
        convolution = QuantConv2d.from_convolution(nn.Conv2d(32, 4, 3, padding=1), Scheme.parse(text), "rtn")
        images = torch.randn(2, 32, 5, 4)
        torch.testing.assert_close(convolution(images[0]), convolution(images)[0])
        assert convolution(images[:0]).shape == (0, 4, 5, 4)

    def test_of_an_image_that_is_not_finite_is_nan_alone(self) -> None:
        convolution = QuantConv2d.from_convolution(nn.Conv2d(32, 4, 1), Scheme(6, 8), "rtn")
        images = torch.randn(2, 32, 3, 3)
        images[1, 0, 0, 0] = torch.inf
        assert convolution(images).isnan().flatten(1).all(1).tolist() == [False, True]


class Wider(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class TestRefusal:
    @pytest.mark.parametrize(
        ("make", "text", "reason"),
        [
            (lambda: nn.Linear(64, 4), "w4a16g64", None),
            (lambda: Conv1D(4, 64), "w6a8", None),
            (lambda: nn.Conv2d(32, 4, 3), "w4a8", None),
            (lambda: nn.Linear(48, 4), "w4a16", "columns cannot be 48; accepted: a multiple of 32"),
            (lambda: nn.Linear(96, 4), "w4a16g64", "columns cannot be 96; accepted: a multiple of 64"),
            (lambda: nn.Conv2d(3, 4, 3), "w4a16", "columns cannot be 27"),
            (lambda: nn.Linear(64, 4), "w4a16asym", "no kernel multiplies w4a16asym"),
            (lambda: nn.Embedding(64, 64), "w4a16", "an embedding looks rows up"),
            (lambda: nn.Conv1d(64, 4, 1), "w4a16", "a Conv1d is neither"),
            (lambda: nn.LayerNorm(64), "w4a16", "a LayerNorm is neither"),
            (lambda: nn.Conv2d(64, 64, 3, groups=2), "w4a16", "its 2 groups"),
            (lambda: nn.Conv2d(32, 4, 3, padding="same"), "w4a16", "it pads with zeros, same"),
            (lambda: nn.Conv2d(32, 4, 3, padding=1, padding_mode="reflect"), "w4a16", "it pads with reflect"),
            (lambda: Wider(64, 4), "w4a16", "Wider computes more than Linear"),
            (lambda: nn.MultiheadAttention(64, 2).out_proj, "w4a16", "the attention around it"),
        ],
    )
    def test_says_why(self, make: Callable[[], nn.Module], text: str, reason: str | None) -> None:
        module, scheme = make(), Scheme.parse(text)
        found = refusal(module, scheme)
        if reason is None:
            assert found is None
            return
        assert found is not None
        assert reason in found
        with pytest.raises(KernelError, match="cannot run"):
            QuantLinear.from_linear(module, scheme, "rtn")


class Tied(nn.Module):
    """Two layers of one weight, one of them under two names, and a layer apart."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])
        self.again = self.blocks[0]
        self.blocks[1].weight = self.blocks[0].weight
        self.apart = nn.Linear(64, 3)
        self.table = nn.Embedding(8, 64)
        self.head = nn.Linear(64, 8, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.apart(self.again(self.blocks[1](self.blocks[0](x))))


class TestSwapped:
    @torch.no_grad()
    def test_a_layer_and_its_aliases_multiply_by_packed_weights_and_then_by_their_own(self) -> None:
        model, x, scheme = seeded(Tied), torch.randn(5, 64), Scheme(4, 16, 32)
        before = model(x)
        with swapped(model, {"blocks.0": scheme, "apart": FULL_PRECISION}):
            inside = model(x)
            stand_ins = [vars(block)["forward"].__self__ for block in model.blocks]
            assert [type(one) for one in stand_ins] == [QuantLinear, QuantLinear]
            assert stand_ins[0].tiles is stand_ins[1].tiles
            assert "forward" not in vars(model.apart)
        assert all("forward" not in vars(module) for module in model.modules())
        assert torch.equal(model(x), before)
        model.blocks[0].weight.copy_(faked(model.blocks[0].weight, scheme))
        torch.testing.assert_close(inside, model(x), rtol=1e-5, atol=1e-5)

    def test_leaves_nothing_behind_after_an_error(self) -> None:
        model = seeded(Tied)
        with pytest.raises(ZeroDivisionError), swapped(model, {"apart": Scheme(8, 8)}):
            raise ZeroDivisionError
        assert all("forward" not in vars(module) for module in model.modules())

    @torch.no_grad()
    def test_weights_and_hooks_stay_where_a_model_looks_for_them(self) -> None:
        model, heard = seeded(Tied), []
        model.apart.register_forward_hook(lambda _module, _inputs, output: heard.append(output))
        weight = model.apart.weight
        with swapped(model, {"apart": Scheme(8, 8)}):
            output = model(torch.randn(2, 64))
            assert model.apart.weight is weight
        assert torch.equal(heard[0], output)

    def test_a_layer_that_computes_otherwise_than_its_class_is_refused(self) -> None:
        model = seeded(Tied)
        model.apart.forward = lambda x: x
        with pytest.raises(KernelError, match="not that of its class"), swapped(model, {"apart": Scheme(8, 8)}):
            pass
        torch.nn.utils.parametrizations.weight_norm(model.blocks[1])
        assert "computed anew" in str(refusal(model.blocks[1], Scheme(8)))
        assert "float64" in str(refusal(nn.Linear(64, 8).double(), Scheme(8)))

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("head", "table cannot run in w4a16: an embedding"),
            ("apart[0:2]", "part of a layer"),
            ("missing", "no layer missing"),
            ("blocks", "no layer blocks"),
        ],
    )
    def test_refuses_before_it_touches_the_model(self, name: str, reason: str) -> None:
        model = seeded(Tied)
        with pytest.raises(KernelError, match=reason), swapped(model, {"apart": Scheme(4), name: Scheme(4)}):
            pass
        assert all("forward" not in vars(module) for module in model.modules())


def text_evaluator(model: LoadedModel) -> Evaluator:
    return Evaluator(model, load_data(Calibration(samples=2, sequence_length=32), model))


def digits_evaluator(model: LoadedModel) -> Evaluator:
    images, labels = (torch.from_numpy(array[-models.HELD_OUT :]) for array in models.digits_arrays())
    batch = {"pixel_values": images, "labels": labels}
    return Evaluator(model, Data([batch], [batch], [batch], "digits"))


def supported(evaluator: Evaluator, text: str) -> dict[str, Scheme]:
    """A scheme for every layer that kernels can run in it."""
    scheme = Scheme.parse(text)
    return {
        name: scheme
        for name in evaluator.layers
        if all(refusal(module, scheme) is None for module in evaluator.modules(name))
    }


@torch.no_grad()
def fake_and_real(evaluator: Evaluator, allocation: dict[str, Scheme]) -> tuple[Tensor, Tensor]:
    """The output on held-out data: as the evaluator fakes the allocation, and as packed weights give it."""
    batch = evaluator.batches("held_out")[0]
    evaluator.apply(allocation)
    fake = evaluator.loaded(batch)
    evaluator.apply({})
    with swapped(evaluator.loaded.model, allocation, evaluator.quantizer, backend="reference"):
        return fake, evaluator.loaded(batch)


@torch.no_grad()
def fake_in_float64(evaluator: Evaluator, allocation: dict[str, Scheme]) -> Tensor:
    """The output as the evaluator fakes the allocation, in float64 from the weights rounded in float32 on."""
    model = evaluator.loaded.model
    evaluator.apply(allocation)
    rounded = {parameter: parameter.data for parameter in model.parameters()}
    # Not model.double(): transformers refuses that of a model that was read from GGUF.
    nn.Module.double(model)
    output = evaluator.loaded(evaluator.batches("held_out")[0])
    for parameter, data in rounded.items():
        parameter.data = data
    nn.Module.float(model)
    evaluator.apply({})
    return output


def task_loss(evaluator: Evaluator, output: Tensor) -> float:
    """Cross-entropy of labels or next tokens; of embeddings, what the evaluator takes."""
    batch = evaluator.batches("held_out")[0]
    if "labels" in batch:
        return float(functional.cross_entropy(output, batch["labels"]))
    if evaluator.loaded.task == "causal-lm":
        return float(next_token_loss(output, batch["input_ids"], batch["attention_mask"]).mean())
    return float(evaluator.losses(batch, output, evaluator.reference("held_out", 0)).mean())


class TestAgreement:
    """With the evaluator's fake quantisation."""

    @pytest.mark.parametrize("text", ["w4a16g32", "w4a8g32", "w6a8", "w8a8"])
    @pytest.mark.parametrize("name", ["minilm", "tiny_llama", "tiny_gpt2", "digits_resnet"])
    def test_of_a_layer_is_far_closer_than_what_it_rounds(self, loaded: Loader, name: str, text: str) -> None:
        evaluator = (digits_evaluator if "digits" in name else text_evaluator)(loaded(name))
        allocation = supported(evaluator, text)
        original = evaluator.reference("held_out", 0)
        for layer in (*list(allocation)[:6], list(allocation)[-1]):
            fake, real = fake_and_real(evaluator, {layer: allocation[layer]})
            assert (real - fake).norm() < 1e-2 * (fake - original).norm()

    @pytest.mark.parametrize(("name", "layers"), [("minilm", 36), ("tiny_llama", 14), ("tiny_gpt2", 8)])
    def test_of_all_layers_is_in_the_loss_of_text_models(self, loaded: Loader, name: str, layers: int) -> None:
        evaluator = text_evaluator(loaded(name))
        # Embeddings have no loss but their distance from the original's: next to nothing where rounding adds noise.
        for text in ["w4a16g64"] if name == "minilm" else ["w4a16g64", "w6a8", "w8a8"]:
            allocation = supported(evaluator, text)
            assert len(allocation) >= layers
            fake, real = fake_and_real(evaluator, allocation)
            assert task_loss(evaluator, real) == pytest.approx(task_loss(evaluator, fake), rel=1e-3)

    @pytest.mark.parametrize(("name", "layers"), [("digits_vit", 19), ("digits_resnet", 2)])
    def test_of_all_layers_is_in_the_loss_of_classifiers(self, loaded: Loader, name: str, layers: int) -> None:
        evaluator = digits_evaluator(loaded(name))
        for text in ("w4a16g32", "w6a8", "w8a8"):
            allocation = supported(evaluator, text)
            assert len(allocation) == layers
            fake, real = fake_and_real(evaluator, allocation)
            assert task_loss(evaluator, real) == pytest.approx(task_loss(evaluator, fake), rel=1e-3)
            assert (real.argmax(-1) == fake.argmax(-1)).float().mean() > 0.99

    @pytest.mark.parametrize("text", ["w6a8", "w8a8"])
    def test_of_all_layers_is_as_close_as_float64s(self, loaded: Loader, text: str) -> None:
        self.check_as_close_as_float64(text_evaluator(loaded("minilm")), text)

    @pytest.mark.slow
    @pytest.mark.skipif(models.smollm2() is None, reason="scripts/fetch_models.py has not fetched SmolLM2")
    def test_on_smollm2(self) -> None:
        evaluator = text_evaluator(load_model(str(models.smollm2()), torch.device("cpu")))
        allocation = supported(evaluator, "w4a16g64")
        assert len(allocation) == 210
        fake, real = fake_and_real(evaluator, allocation)
        assert task_loss(evaluator, real) == pytest.approx(task_loss(evaluator, fake), rel=1e-3)
        for text in ("w6a8", "w8a8"):
            self.check_as_close_as_float64(evaluator, text)

    def check_as_close_as_float64(self, evaluator: Evaluator, text: str) -> None:
        """Where layer after layer rounds activations, the last bit of a sum decides codes further on: the loss of fake
        quantisation in float32 is itself some percent from that in float64."""
        allocation = supported(evaluator, text)
        fake, real = fake_and_real(evaluator, allocation)
        noise = (fake_in_float64(evaluator, allocation) - fake).norm()
        assert 0 < (real - fake).norm() < 2 * noise
        assert noise < (fake - evaluator.reference("held_out", 0)).norm()
