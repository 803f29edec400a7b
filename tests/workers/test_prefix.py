"""Entering a model midway gives what running it whole gives, bit for bit; where it would not, there is no chain."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests import models
from tests.workers.conftest import Loader
from workers.calibration import one_item
from workers.prefix import BlockChain, find_chain

Run = Callable[[], Tensor]


@pytest.fixture(
    params=["minilm", "tiny_llama", "tiny_gpt2", "tiny_moe", "digits_vit", "digits_resnet", "efficientnet_lite0"]
)
def model_and_run(request: pytest.FixtureRequest, loaded: Loader) -> tuple[nn.Module, Run, str]:
    generator = torch.Generator().manual_seed(0)
    if request.param == "efficientnet_lite0":
        model, _ = models.efficientnet_lite0()
        image = torch.rand(1, 3, 64, 64, generator=generator)
        return model, lambda: model(image), "_blocks.0"
    model = loaded(request.param)
    batch = one_item(model)
    if model.is_text:
        batch = {
            "input_ids": torch.randint(4, 200, (2, 9), generator=generator),
            "attention_mask": torch.tensor([[1] * 9, [1] * 6 + [0] * 3]),
        }
    else:
        batch = {"pixel_values": torch.randn(batch["pixel_values"].shape, generator=generator)}
    first = {
        "minilm": "encoder.layer.0",
        "tiny_gpt2": "transformer.h.0",
        "digits_vit": "vit.layers.0",
        "digits_resnet": "resnet.encoder.stages.0",
    }
    return model.model, lambda: model(batch), first.get(request.param, "model.layers.0")


def perturb(block: nn.Module) -> None:
    for parameter in block.parameters():
        parameter.data = parameter.data + torch.randn_like(parameter) * parameter.abs().mean()


@torch.no_grad()
def test_reuse_is_exact(model_and_run: tuple[nn.Module, Run, str]) -> None:
    model, run, first = model_and_run
    chain = find_chain(model, run)
    assert chain is not None
    assert chain.names[0] == first
    whole = run()
    for index in sorted({1, len(chain) // 2, len(chain) - 1, len(chain)}):
        before = chain.output_of(index - 1, run)
        with chain.resumed(index, before):
            assert torch.equal(run(), whole)
        if index < len(chain):
            originals = {parameter: parameter.data for parameter in chain.blocks[index].parameters()}
            perturb(chain.blocks[index])
            with chain.resumed(index, before):
                resumed = run()
            assert torch.equal(resumed, run())
            assert not torch.equal(resumed, whole)
            for parameter, data in originals.items():
                parameter.data = data
    assert torch.equal(run(), whole)


@torch.no_grad()
def test_skipped_blocks_do_no_work_and_are_themselves_again_after(loaded: Loader) -> None:
    model = loaded("tiny_llama")
    batch = one_item(model)
    chain = find_chain(model.model, lambda: model(batch))
    assert chain is not None
    before = chain.output_of(0, lambda: model(batch))
    chain.blocks[0].mlp.up_proj.weight.fill_(float("nan"))  # type: ignore[union-attr, operator]
    with chain.resumed(1, before):
        assert model(batch).isfinite().all()
    with pytest.raises(KeyError), chain.resumed(1, before):
        model({})
    assert all("forward" not in vars(block) for block in chain.blocks)
    assert model(batch).isnan().any()


def test_a_layers_block_is_found_by_its_whole_name() -> None:
    chain = BlockChain({f"layers.{index}": nn.Linear(1, 1) for index in range(12)})
    assert chain.block_of("layers.1.mlp.up_proj") == "layers.1"
    assert chain.block_of("layers.11.mlp.up_proj") == "layers.11"
    assert chain.block_of("lm_head") is None


class Blocks(nn.Module):
    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(count))


class Parallel(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        return sum(block(x) for block in self.blocks)


class Skip(Blocks):
    """The first block's output reaches the head by a way of its own."""

    def forward(self, x: Tensor) -> Tensor:
        first = second = self.blocks[0](x)
        for block in self.blocks[1:]:
            second = block(second)
        return first * second


class Reversed(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        for block in reversed(self.blocks):
            x = block(x)
        return x


class Twice(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.blocks, *self.blocks]:
            x = block(x)
        return x


class InPlace(Blocks):
    """What follows the blocks changes their output in place."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.add_(1)


class Single(Blocks):
    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x)


@pytest.mark.parametrize("kind", [Parallel, Skip, Reversed, Twice, InPlace, Single])
def test_blocks_that_are_no_chain_are_not_taken_for_one(kind: type[nn.Module]) -> None:
    model = kind()
    x = torch.randn(1, 4)
    expected = model(x)
    assert find_chain(model, lambda: model(x)) is None
    assert torch.equal(model(x), expected)


def test_the_chain_with_the_most_parameters_is_taken() -> None:
    small = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8))
    large = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 8))
    model = nn.ModuleDict({"small": small, "large": large})
    x = torch.randn(1, 4)
    chain = find_chain(model, lambda: large(small(x)))
    assert chain is not None
    assert chain.names == ["large.0", "large.1", "large.2"]


def test_checkpointed_blocks_give_the_same_gradients_and_keep_fewer_activations() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(4)))
    x = torch.randn(8, 16)
    chain = find_chain(model, lambda: model(x))
    assert chain is not None

    def differentiated() -> tuple[list[Tensor], int]:
        kept = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(x)
        return list(torch.autograd.grad(output.square().sum(), list(model.parameters()))), kept

    plain, all_kept = differentiated()
    with chain.checkpointed():
        again, few_kept = differentiated()
    after, kept_after = differentiated()
    for gradient, recomputed, last in zip(plain, again, after, strict=True):
        torch.testing.assert_close(recomputed, gradient)
        torch.testing.assert_close(last, gradient)
    assert few_kept < all_kept / 4
    assert kept_after == all_kept
