"""Reuse of a forward pass: a model's chain of blocks, entered at any block with what the blocks before it gave.

Exact, not approximate: when only block k and later ones change, everything before k is replaced by its cached output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from workers.hooks import forward_replaced, removing


class BlockChain:
    """Blocks that run one after the other, each fed with the output of the one before."""

    def __init__(self, blocks: dict[str, nn.Module]) -> None:
        self.names = list(blocks)
        self.blocks = list(blocks.values())

    def __len__(self) -> int:
        return len(self.blocks)

    def block_of(self, layer: str) -> str | None:
        """The qualified name of the block in which the layer stands; None outside the chain."""
        return next((name for name in self.names if layer.startswith(f"{name}.")), None)

    @contextmanager
    def resumed(self, index: int, before: Any) -> Iterator[None]:
        """Within, blocks before `index` do no work: each returns `before`, the output of block index − 1."""
        with ExitStack() as stack:
            for block in self.blocks[:index]:
                stack.enter_context(forward_replaced(block, lambda *_args, **_kwargs: before))
            yield

    @contextmanager
    def checkpointed(self) -> Iterator[None]:
        """Within, a backward pass computes each block's activations again instead of keeping them."""
        with ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(forward_replaced(block, partial(checkpoint, block.forward, use_reentrant=False)))
            yield

    def output_of(self, index: int, run: Callable[[], object]) -> Any:
        """What block `index` gives during `run`; nothing after it is computed."""

        def stop(_module: nn.Module, _inputs: object, output: Any) -> None:
            raise _Reached(output)

        hook = self.blocks[index].register_forward_hook(stop)
        try:
            run()
        except _Reached as reached:
            return reached.output
        finally:
            hook.remove()
        raise RuntimeError(f"block {self.names[index]} did not run")


class _Reached(Exception):
    def __init__(self, output: Any) -> None:
        self.output = output


def find_chain(model: nn.Module, run: Callable[[], Tensor]) -> BlockChain | None:
    """The chain with the most parameters among the model's module lists; None when there is none.

    `run` gives the model's output on some input. A list is a chain when it ran in order, each block's first input being
    the very tensor that the block before gave, and when entering it midway reproduces the output bit for bit.
    """
    candidates = {
        name: {f"{name}.{child}": block for child, block in module.named_children()}
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) >= 2
    }
    calls: dict[nn.Module, list[tuple[Any, Any]]] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        first = args[0] if args else next(iter(kwargs.values()), None)
        calls.setdefault(module, []).append((first, output))

    watched = {block for blocks in candidates.values() for block in blocks.values()}
    hooks = [block.register_forward_hook(record, with_kwargs=True) for block in watched]
    with removing(hooks), torch.no_grad():
        expected = run()

    def size(name: str) -> int:
        return sum(parameter.numel() for block in candidates[name].values() for parameter in block.parameters())

    for name in sorted(candidates, key=size, reverse=True):
        chain = BlockChain(candidates[name])
        if _is_chain(chain.blocks, calls) and _reproduces(chain, run, expected):
            return chain
    return None


def _is_chain(blocks: list[nn.Module], calls: dict[nn.Module, list[tuple[Any, Any]]]) -> bool:
    if any(len(calls.get(block, [])) != 1 for block in blocks):
        return False
    pairs = [calls[block][0] for block in blocks]
    return all(first is not None and first is _tensor(output) for (_, output), (first, _) in pairwise(pairs))


def _tensor(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) else output


def _reproduces(chain: BlockChain, run: Callable[[], Tensor], expected: Tensor) -> bool:
    with torch.no_grad():
        for index in {1, len(chain) // 2, len(chain) - 1, len(chain)}:
            before = chain.output_of(index - 1, run)
            with chain.resumed(index, before):
                # Twice: what changes its input in place would spoil it for the next run.
                if not all(torch.equal(run(), expected) for _ in range(2)):
                    return False
    return True
