"""The scheme grammar and what a scheme stores."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.errors import InvalidRequest
from search.scheme import ACTIVATION_BITS, FULL_PRECISION, GROUP_SIZES, WEIGHT_BITS, Scheme

quantized = st.builds(
    Scheme,
    st.sampled_from([bits for bits in WEIGHT_BITS if bits < 16]),
    st.sampled_from(ACTIVATION_BITS),
    st.sampled_from([None, *GROUP_SIZES]),
    st.booleans(),
)


@given(quantized | st.just(FULL_PRECISION))
def test_text_and_scheme_are_inverse(scheme: Scheme) -> None:
    assert Scheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize(
    "text",
    [
        "",
        "w4",
        "int4",
        "w9a16",
        "w4a7",
        "w4a16g65",
        "w4a16g0",
        "w16a8",
        "w16a16g64",
        "W4A16",
        "w4a16 ",
        "w04a16x",
        "w٤a16",
    ],
)
def test_what_is_not_in_the_grammar_is_refused_with_the_grammar(text: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        Scheme.parse(text)
    problem = refused.value.problem()
    assert problem["status"] == 422
    assert problem["value"] == text
    assert "w4a16g64" in problem["accepted"]


def test_storage_counts_codes_scales_and_zero_points() -> None:
    rows, columns = 10, 128
    assert Scheme.parse("w16a16").storage_bits(rows, columns) == rows * columns * 16
    assert Scheme.parse("w4a16").storage_bits(rows, columns) == rows * columns * 4 + rows * 16
    assert Scheme.parse("w4a16g64").storage_bits(rows, columns) == rows * columns * 4 + rows * 2 * 16
    assert Scheme.parse("w4a16g64asym").storage_bits(rows, columns) == rows * columns * 4 + rows * 2 * (16 + 4)


def test_w4a16g64_is_four_and_a_quarter_bits() -> None:
    assert Scheme.parse("w4a16g64").storage_bits(8, 256) / (8 * 256) == 4.25


def test_schemes_sort_from_coarse_to_fine() -> None:
    texts = ["w3a16g32", "w4a8", "w4a16", "w4a16g128", "w4a16g64", "w4a16g64asym", "w8a16"]
    assert [str(scheme) for scheme in sorted(Scheme.parse(text) for text in reversed(texts))] == texts


def test_group_size_must_divide() -> None:
    assert Scheme.parse("w4a16g64").fits(128)
    assert not Scheme.parse("w4a16g64").fits(96)
    assert Scheme.parse("w4a16").fits(97)
