"""Products go to the best backend that can compute them, never to another than was asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from search.scheme import Scheme
from workers.kernels import backend, reference
from workers.kernels.backend import BACKENDS, deploys, matmul, matmul_codes
from workers.kernels.errors import KernelError
from workers.kernels.pack import Packed, pack


class OfEight:
    """A backend that multiplies only 8-bit weights on a CPU, and answers with sevens."""

    def device_refusal(self, device: torch.device) -> str | None:
        return None if device.type == "cpu" else "it multiplies on CPUs only"

    def refusal(self, packed: Packed, tokens: int, dtype: torch.dtype) -> str | None:
        return None if packed.scheme.weight_bits == 8 else "it multiplies weights of 8 bits only"

    def matmul(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        return x.new_full((len(x), packed.rows), 7)

    def matmul_codes(
        self, codes: Tensor, token_scales: Tensor, packed: Packed, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        return torch.full((len(codes), packed.rows), 7, dtype=out_dtype)


@pytest.fixture
def of_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers `OfEight` for one test; nothing else but the reference is."""
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    monkeypatch.setattr(backend, "BACKENDS", {"reference": BACKENDS["reference"]})
    backend.backend("of-eight")(OfEight)


def weight(text: str, rows: int = 5, columns: int = 64) -> Packed:
    scheme = Scheme.parse(text)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-4, 4, (rows, columns), dtype=torch.int8, generator=generator)
    return pack(codes, torch.full((rows, columns // (scheme.group_size or columns)), 0.25), scheme)


X = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1))
CODES, SCALES = reference.quantize_activations(X[0], 8)


class TestChoice:
    def test_falls_on_the_backend_registered_last_that_can(self, of_eight: None) -> None:
        assert (matmul(X, weight("w8a8")) == 7).all()
        assert torch.equal(matmul(X[0], weight("w6a8")), reference.matmul(X[0], weight("w6a8")))

    def test_of_codes_is_the_same(self, of_eight: None) -> None:
        assert (matmul_codes(CODES, SCALES, weight("w8a8")) == 7).all()
        expected = reference.matmul(X[0], weight("w6a8"))
        assert torch.equal(matmul_codes(CODES, SCALES, weight("w6a8")), expected)

    def test_by_name_is_kept_to(self, of_eight: None) -> None:
        found = matmul(X[0], weight("w8a8"), backend="reference")
        assert torch.equal(found, reference.matmul(X[0], weight("w8a8")))

    def test_of_a_backend_that_cannot_is_refused_with_its_reason(self, of_eight: None) -> None:
        with pytest.raises(KernelError, match=r"6 × 64 tokens by 5 × 64 weights in w6a8: .* 8 bits only") as caught:
            matmul(X, weight("w6a8"), backend="of-eight")
        assert (caught.value.field, caught.value.value) == ("backend", "of-eight")
        assert caught.value.accepted == ["reference"]

    def test_of_an_unknown_backend_is_refused(self, of_eight: None) -> None:
        with pytest.raises(KernelError, match="triton") as caught:
            matmul(X, weight("w6a8"), backend="triton")
        assert caught.value.accepted == ["of-eight", "reference"]

    def test_by_the_environment_holds_where_none_is_named(
        self, of_eight: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("BITFRONTIER_KERNELS", "reference")
        assert not (matmul(X, weight("w8a8")) == 7).any()
        assert (matmul(X, weight("w8a8"), backend="of-eight") == 7).all()
        monkeypatch.setenv("BITFRONTIER_KERNELS", "triton")
        with pytest.raises(KernelError, match="triton") as caught:
            matmul(X, weight("w8a8"))
        assert caught.value.field == "BITFRONTIER_KERNELS"


class TestProduct:
    @pytest.mark.parametrize("text", ["w4a16g32", "w6a8", "w3a4g64"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_keeps_the_leading_dimensions_and_the_type(self, text: str, dtype: torch.dtype) -> None:
        x, packed = X.to(dtype), weight(text)
        found = matmul(x, packed, backend="reference")
        assert (found.shape, found.dtype) == ((2, 3, 5), dtype)
        assert torch.equal(found.flatten(0, 1), reference.matmul(x.flatten(0, 1), packed))
        assert matmul(x[1, 2], packed, backend="reference").shape == (5,)

    @pytest.mark.parametrize("text", ["w8a8", "w8a8g32", "w8a16"])
    def test_is_the_same_under_autocast(self, text: str) -> None:
        x, scheme = 100 * X[0], Scheme.parse(text)
        scales = torch.ones(5, 64 // (scheme.group_size or 64))
        packed = pack(torch.full((5, 64), 127, dtype=torch.int8), scales, scheme)
        expected = reference.matmul(x, packed)
        with torch.autocast("cpu", torch.float16):
            assert torch.equal(matmul(x, packed), expected)
            if packed.scheme.quantizes_activations:
                codes, scales = reference.quantize_activations(x, 8)
                assert torch.equal(matmul_codes(codes, scales, packed), expected)
            assert torch.is_autocast_enabled("cpu")

    def test_of_no_tokens_is_empty(self) -> None:
        assert matmul(X[:0], weight("w6a8")).shape == (0, 3, 5)

    def test_adds_a_bias(self) -> None:
        bias = torch.arange(5.0)
        assert torch.equal(matmul(X, weight("w6a8"), bias), matmul(X, weight("w6a8")) + bias)

    def test_passes_no_gradient(self) -> None:
        assert not matmul(X.clone().requires_grad_(), weight("w4a16")).requires_grad

    @pytest.mark.parametrize(
        ("x", "bias", "field", "accepted"),
        [
            (X.double(), None, "x", "torch.float16"),
            (X[..., :32], None, "x", r"\(2, 3, 64\)"),
            (torch.tensor(1.0), None, "x", r"\(64,\)"),
            (X.transpose(0, 1), None, "x", "contiguous"),
            (X.to("meta"), None, "x", "cpu"),
            (X, torch.zeros(4), "bias", r"\(5,\)"),
            (X, torch.zeros(5).int(), "bias", "torch.float16"),
        ],
    )
    def test_of_what_does_not_fit_is_refused(self, x: Tensor, bias: Tensor | None, field: str, accepted: str) -> None:
        with pytest.raises(KernelError, match=accepted) as caught:
            matmul(x, weight("w6a8"), bias)
        assert caught.value.field == field

    @pytest.mark.parametrize(
        ("codes", "scales", "text", "out_dtype", "field"),
        [
            (CODES.int(), SCALES, "w6a8", torch.float32, "codes"),
            (CODES[:, :32], SCALES, "w6a8", torch.float32, "codes"),
            (CODES, SCALES[:2], "w6a8", torch.float32, "token_scales"),
            (CODES, SCALES.half(), "w6a8", torch.float32, "token_scales"),
            (CODES, SCALES, "w6a8", torch.float64, "out_dtype"),
            (CODES, SCALES, "w6a16", torch.float32, "scheme"),
        ],
    )
    def test_of_codes_that_do_not_fit_is_refused(
        self, codes: Tensor, scales: Tensor, text: str, out_dtype: torch.dtype, field: str
    ) -> None:
        with pytest.raises(KernelError) as caught:
            matmul_codes(codes, scales, weight(text), out_dtype=out_dtype)
        assert caught.value.field == field


class TestDeployment:
    CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)

    def test_is_where_another_backend_than_the_reference_can_multiply(self, of_eight: None) -> None:
        assert deploys(self.CPU)
        assert not deploys(self.CUDA)

    @pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
    def test_is_nowhere_with_the_reference_alone_unless_it_is_named(
        self, of_eight: None, monkeypatch: pytest.MonkeyPatch, device: torch.device
    ) -> None:
        del backend.BACKENDS["of-eight"]
        assert not deploys(device)
        monkeypatch.setenv("BITFRONTIER_KERNELS", "reference")
        assert deploys(device)

    def test_by_a_backend_that_cannot_is_refused_with_its_reason(
        self, of_eight: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("BITFRONTIER_KERNELS", "of-eight")
        assert deploys(self.CPU)
        with pytest.raises(KernelError, match="of-eight cannot multiply on cuda:0: it multiplies on CPUs") as caught:
            deploys(self.CUDA)
        assert (caught.value.field, caught.value.value) == ("BITFRONTIER_KERNELS", "of-eight")
        assert caught.value.accepted == ["reference"]

    def test_by_an_unknown_backend_is_refused(self, of_eight: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("BITFRONTIER_KERNELS", "triton")
        with pytest.raises(KernelError, match="triton") as caught:
            deploys(self.CPU)
        assert caught.value.accepted == ["of-eight", "reference"]


def test_importing_the_room_imports_no_cupy() -> None:
    modules = "backend, errors, linear, pack, reference"
    script = f"import sys; from workers.kernels import {modules}; sys.exit('cupy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
