"""Whatever the model and the point: a format says exactly what was asked for every layer, or why it cannot."""

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from search.exports import EXPORTS, refusal, render
from search.exports.refusing import all_schemes
from search.inventory import Layer
from search.scheme import ACTIVATION_BITS, FULL_PRECISION, GROUP_SIZES, WEIGHT_BITS, Scheme
from search.space import tie
from search.targets import TARGETS
from tests.search.exports.examples import exported, inventory
from tests.search.exports.readers import READERS

# Of each pair the first is the beginning of the second, or a regular expression for it.
NUMBERS = (("1", "11"), ("0", "10"), ("2",))
PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.v_proj_",
    "self-attn.v+proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
SCHEMES = [
    Scheme(bits, activations, group, symmetric)
    for bits in WEIGHT_BITS[:-1]
    for activations in ACTIVATION_BITS
    for group in (*GROUP_SIZES, None)
    for symmetric in (True, False)
]
COMMON = [Scheme(bits, group_size=group) for bits in (2, 3, 4, 6, 8) for group in (16, 32)]


@st.composite
def models(draw):
    names = PROJECTIONS + draw(st.sampled_from([(), (), (), EXPERTS]))
    size = st.sampled_from([64, 128, 96, 32, 48, 63])
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=5, unique=True))
    # What a runtime merges multiplies the same input.
    columns = {name: draw(size) for name in (*chosen, "self_attn", "mlp.gate+up")}
    shared = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn"}
    shared |= {"gate_proj": "mlp.gate+up", "up_proj": "mlp.gate+up"}
    shapes = {name: (draw(size), columns[shared.get(name.rpartition(".")[2], name)]) for name in chosen}
    layers = [
        Layer(
            f"model.layers.{number}.{name}",
            "experts" if name in EXPERTS else "linear",
            *shapes[name],
            block=f"model.layers.{number}",
        )
        for number in draw(st.sampled_from(NUMBERS))
        for name in chosen
    ]
    head = Layer("lm_head", "linear", 96, 64)
    return inventory([Layer("model.embed_tokens", "embedding", 96, 64), *layers, head], "Qwen3MoeForCausalLM")


@st.composite
def points(draw):
    model = draw(models())
    scheme = st.sampled_from(COMMON) | st.sampled_from(SCHEMES)
    pool = [FULL_PRECISION, *draw(st.lists(scheme, min_size=1, max_size=3, unique=True))]
    units = tie(list(model.layers), TARGETS[draw(st.sampled_from(sorted(TARGETS)))])
    allocation = {}
    for unit in units:
        scheme = draw(st.sampled_from(pool))
        if all(scheme.fits(layer.columns) for layer in unit.layers) and draw(st.booleans()):
            allocation |= {layer.name: scheme for layer in unit.layers}
    assume(allocation)
    return model, allocation


def corrected(name, model, allocation):
    """The point that comes of following the refusals' advice; None where one of them names no scheme to take."""
    for _ in range(3 * len(model.layers)):
        point = exported(model, allocation, "generic")
        error = refusal(name, point)
        if error is None:
            return point
        assert error.detail, "the refusal gives no reason"
        assert error.accepted, "the refusal does not say what is accepted"
        changed = advised(error, point)
        if not changed:
            return None
        assert any(allocation.get(layer) != scheme for layer, scheme in changed.items()), (
            f"{error.detail} leads nowhere"
        )
        allocation = allocation | changed
    raise AssertionError("the advice has no end")


def advised(error, point):
    """Layer → the scheme that the refusal would have it take."""
    layers = error.value if isinstance(error.value, dict) else [error.field]
    if not set(layers) <= set(all_schemes(point)) or not str(error.accepted).startswith("w"):
        return {}
    return dict.fromkeys(layers, Scheme.parse(error.accepted))


@pytest.mark.parametrize("name", sorted(EXPORTS))
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(points())
def test_a_format_holds_exactly_the_point_or_says_what_it_would_take(name, drawn):
    model, allocation = drawn
    point = corrected(name, model, allocation)
    if point is None:
        return
    text = render(name, point)
    for layer, scheme in zip(model.layers, all_schemes(point).values(), strict=True):
        if name in READERS and (layer.kind != "embedding" or scheme != FULL_PRECISION):
            assert (READERS[name](text, layer) or FULL_PRECISION) == scheme, layer.name
