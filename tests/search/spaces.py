"""Small spaces for the search tests."""

from search.inventory import Inventory, Layer
from search.request import SpaceRequest
from search.space import Space, build_space
from search.targets import find_target


def decoder(blocks: int = 2, width: int = 64) -> Inventory:
    """A Llama-like model: q, k, v, o, gate, up, down per block; an embedding tied to the head."""
    layers = [Layer("model.embed_tokens", "embedding", 1000, width, width * 1000, None, ("lm_head",))]
    for index in range(blocks):
        block = f"model.layers.{index}"
        shapes = {
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (width // 2, width),
            "self_attn.v_proj": (width // 2, width),
            "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (2 * width, width),
            "mlp.up_proj": (2 * width, width),
            "mlp.down_proj": (width, 2 * width),
        }
        layers += [
            Layer(f"{block}.{name}", "linear", rows, columns, rows * columns, block)
            for name, (rows, columns) in shapes.items()
        ]
    parameters = sum(layer.weights for layer in layers) + 10
    return Inventory("digest", "LlamaForCausalLM", "causal-lm", parameters, tuple(layers))


def space(inventory: Inventory, target: str = "vllm", **request: object) -> Space:
    """The space of a request over `inventory`."""
    request.setdefault("schemes", ("w4a16g32", "w6a16g32", "w8a16g32"))
    return build_space(inventory, SpaceRequest.model_validate(request), find_target(target))
