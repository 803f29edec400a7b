"""What every quantizer keeps to, over every weight scheme: codes, scales, nearest points; rtn against its oracle."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from search.scheme import Scheme
from workers.quantizers import QUANTIZERS, Grid, choose_grid, round_to_grid
from workers.quantizers.activation import round_activation

schemes = st.builds(Scheme, st.integers(2, 8), st.just(16), st.sampled_from([None, 16]), st.booleans())
every_quantizer = pytest.mark.parametrize("name", sorted(QUANTIZERS))
patient = settings(deadline=None)


@st.composite
def weights(draw: st.DrawFn, smallest: int = -10, greatest: int = 8) -> Tensor:
    """Rows × columns: Gaussian, heavy-tailed or one-sided, of any magnitude, some groups zero."""
    rows, groups = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    matrix = torch.randn(rows, 16 * groups, generator=generator)
    shape = draw(st.sampled_from(["gaussian", "heavy", "positive", "negative"]))
    matrix = {"gaussian": matrix, "heavy": matrix**3, "positive": matrix.abs(), "negative": -matrix.abs()}[shape]
    matrix = matrix * 10.0 ** draw(st.integers(smallest, greatest))
    if draw(st.booleans()):
        matrix[0, :16] = 0
    return matrix


def grouped(matrix: Tensor, scheme: Scheme) -> Tensor:
    return matrix.reshape(len(matrix), -1, scheme.group_size or matrix.shape[1])


def grid_points(grid: Grid, bits: int) -> Tensor:
    """Every number that a group can hold: rows × groups × 2^bits."""
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).float()
    return (codes - (0 if grid.zero_point is None else grid.zero_point)) * grid.scale


def squared_errors(matrix: Tensor, scheme: Scheme, name: str) -> Tensor:
    rounded = round_to_grid(matrix, choose_grid(matrix, scheme, name), scheme)
    return grouped((rounded - matrix).double(), scheme).square().sum(-1)


@every_quantizer
@patient
@given(matrix=weights(), scheme=schemes)
def test_every_weight_goes_to_the_nearest_of_its_groups_points(name: str, matrix: Tensor, scheme: Scheme) -> None:
    grid = choose_grid(matrix, scheme, name)
    rounded = round_to_grid(matrix, grid, scheme)
    assert rounded.shape == matrix.shape
    points = grid_points(grid, scheme.weight_bits)
    assert points.isfinite().all()
    original, stored = grouped(matrix, scheme), grouped(rounded, scheme)
    for row_stored, row_points in zip(stored.flatten(0, 1), points.flatten(0, 1), strict=True):
        assert torch.isin(row_stored, row_points).all()
    least = (original.unsqueeze(-1) - points.unsqueeze(-2)).abs().amin(-1)
    assert ((original - stored).abs() <= least + 1e-4 * grid.scale).all()


@every_quantizer
@patient
@given(matrix=weights(), scheme=schemes)
def test_scales_are_16_bit_and_zero_points_as_wide_as_a_code(name: str, matrix: Tensor, scheme: Scheme) -> None:
    grid = choose_grid(matrix, scheme, name)
    groups = matrix.numel() // (scheme.group_size or matrix.shape[1])
    assert grid.scale.numel() == groups
    assert (grid.scale > 0).all()
    assert torch.equal(grid.scale.half().float(), grid.scale)
    assert (grid.zero_point is None) == scheme.symmetric
    if grid.zero_point is not None:
        assert grid.zero_point.shape == grid.scale.shape
        assert torch.equal(grid.zero_point.round(), grid.zero_point)
        assert grid.zero_point.min() >= -(2 ** (scheme.weight_bits - 1))
        assert grid.zero_point.max() <= 2 ** (scheme.weight_bits - 1) - 1


@every_quantizer
@patient
@given(matrix=weights(), scheme=schemes)
def test_zero_stays_zero(name: str, matrix: Tensor, scheme: Scheme) -> None:
    matrix[:, ::3] = 0
    rounded = round_to_grid(matrix, choose_grid(matrix, scheme, name), scheme)
    assert (rounded[matrix == 0] == 0).all()


@every_quantizer
@patient
@given(matrix=weights(), scheme=schemes)
def test_rounding_twice_is_rounding_once(name: str, matrix: Tensor, scheme: Scheme) -> None:
    grid = choose_grid(matrix, scheme, name)
    once = round_to_grid(matrix, grid, scheme)
    assert torch.equal(round_to_grid(once, grid, scheme), once)


@every_quantizer
@patient
@given(matrix=weights(), scheme=schemes, data=st.data())
def test_some_rows_are_rounded_as_in_the_whole_weight(
    name: str, matrix: Tensor, scheme: Scheme, data: st.DataObject
) -> None:
    """Groups lie within a row: output channels that take a scheme of their own lose what they lose in a whole layer."""
    start = data.draw(st.integers(0, len(matrix) - 1))
    rows = slice(start, data.draw(st.integers(start + 1, len(matrix))))
    whole, part = choose_grid(matrix, scheme, name), choose_grid(matrix[rows], scheme, name)
    assert torch.equal(part.scale, whole.scale[rows])
    assert (part.zero_point is None) == (whole.zero_point is None)
    if part.zero_point is not None and whole.zero_point is not None:
        assert torch.equal(part.zero_point, whole.zero_point[rows])
    assert torch.equal(round_to_grid(matrix[rows], part, scheme), round_to_grid(matrix, whole, scheme)[rows])


@every_quantizer
@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
@patient
@given(matrix=weights(-3, 2), scheme=schemes)
def test_a_weight_keeps_its_type_and_stays_finite(name: str, kind: torch.dtype, matrix: Tensor, scheme: Scheme) -> None:
    rounded = round_to_grid(matrix.to(kind), choose_grid(matrix.to(kind), scheme, name), scheme)
    assert rounded.dtype == kind
    assert rounded.isfinite().all()


@patient
@given(matrix=weights(-2, 3), scheme=schemes)
def test_rtn_is_off_by_half_a_step_at_most(matrix: Tensor, scheme: Scheme) -> None:
    grid = choose_grid(matrix, scheme, "rtn")
    error = grouped(round_to_grid(matrix, grid, scheme) - matrix, scheme).abs()
    # The 16-bit scale may be short by 2^-11 of itself, which the outermost of 2^b codes feels most.
    assert (error <= grid.scale * (0.5 + 2.0 ** (scheme.weight_bits - 11))).all()


@patient
@given(matrix=weights(), scheme=schemes)
def test_mse_is_never_worse_than_rtn_in_any_group(matrix: Tensor, scheme: Scheme) -> None:
    rtn = squared_errors(matrix, scheme, "rtn")
    assert (squared_errors(matrix, scheme, "mse") <= rtn * (1 + 1e-5)).all()


def test_mse_halves_the_error_of_a_group_with_an_outlier() -> None:
    matrix = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    matrix[:, 7] = 8.0
    scheme = Scheme.parse("w3a16")
    assert squared_errors(matrix, scheme, "mse").sum() < squared_errors(matrix, scheme, "rtn").sum() / 2


@pytest.mark.parametrize("bits", range(2, 9))
def test_rtn_finds_the_asymmetric_grid_that_a_weight_lies_on(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (5, 32), generator=torch.Generator().manual_seed(bits))
    codes[:, 0], codes[:, 1] = 0, 2**bits - 1
    matrix = (codes - 2 ** (bits - 1) + 1).float() * 0.0078125
    scheme = Scheme(bits, symmetric=False)
    assert torch.equal(round_to_grid(matrix, choose_grid(matrix, scheme, "rtn"), scheme), matrix)


@patient
@given(st.integers(3, 8), st.floats(1e-7, 1e-4))
def test_small_weights_use_all_their_bits(bits: int, greatest: float) -> None:
    """The scale may be a subnormal number: a group is not lost because its weights are small."""
    matrix = torch.linspace(-greatest, greatest, 64)[None]
    scheme = Scheme(bits)
    step = choose_grid(matrix, scheme, "rtn").scale.item()
    assert step == pytest.approx(max(greatest / (2**bits - 1) * 2, 2.0**-24), abs=2.0**-25)


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("bits", range(2, 9))
def test_symmetric_rtn_is_compressed_tensors_own(bits: int, group: int | None) -> None:
    scheme = Scheme(bits, 16, group)
    matrix = torch.randn(16, 128, generator=torch.Generator().manual_seed(bits)) * 0.05
    arguments = QuantizationArgs(
        num_bits=bits,
        symmetric=True,
        group_size=group,
        strategy=QuantizationStrategy.GROUP if group else QuantizationStrategy.CHANNEL,
    )
    groups = grouped(matrix, scheme)
    theirs, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    # A checkpoint keeps scales in 16 bits.
    theirs = theirs.half().float()
    ours = choose_grid(matrix, scheme, "rtn")
    assert torch.equal(ours.scale.squeeze(-1), theirs)
    assert torch.equal(round_to_grid(matrix, ours, scheme), fake_quantize(matrix, theirs, zero_point, arguments))


activation_bits = pytest.mark.parametrize("bits", [4, 6, 8])


@activation_bits
@patient
@given(tokens=weights())
def test_activations_go_to_the_nearest_of_their_tokens_levels(bits: int, tokens: Tensor) -> None:
    rounded = round_activation(tokens, bits)
    most = 2 ** (bits - 1) - 1
    scale = tokens.abs().amax(-1, keepdim=True).clamp_min(1e-12) / most
    codes = rounded / scale
    torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)
    assert codes.abs().max() <= most + 1e-3
    assert ((tokens - rounded).abs() <= 0.5001 * scale).all()
    assert (rounded[tokens == 0] == 0).all()


@activation_bits
def test_a_tokens_rounding_depends_on_no_other_token(bits: int) -> None:
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    louder = x.clone()
    louder[1, 3] *= 1000
    kept = torch.ones(2, 5, dtype=torch.bool)
    kept[1, 3] = False
    assert torch.equal(round_activation(louder, bits)[kept], round_activation(x, bits)[kept])


@activation_bits
def test_an_image_is_one_token_to_a_convolution(bits: int) -> None:
    images = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    rounded = round_activation(images, bits, token_dims=3)
    assert torch.equal(rounded, round_activation(images.flatten(1), bits).view_as(images))
    assert all(len(image.unique()) <= 2**bits - 1 for image in rounded)
