import pytest
import torch

from lorry.actors.model import products
from lorry.actors.model.products import linear, linear_backward, linear_float32, linear_of_each


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("at_once", [1, 100, 1 << 22])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_in_float32_are_rounded_nowhere_whatever_their_inputs(
    dtype: torch.dtype, at_once: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_WIDENED_ELEMENTS", at_once)
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in ((5, 32), (97, 32), (97,)))
    found = linear_float32(x, weight, bias if with_bias else None)
    expected = x.double() @ weight.double().T + (bias.double() if with_bias else 0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("most", [0, 1 << 22])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_are_the_same_through_either_library(
    most: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_ONEDNN_ROWS", most)
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((70, 32), (97, 32), (97,)))
    y = linear(x, weight, bias if with_bias else None)
    torch.testing.assert_close(y, x @ weight.T + (bias if with_bias else 0))
    torch.testing.assert_close(linear_backward(y, weight), y @ weight)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_each_product_is_there_as_soon_as_it_is_told_of(with_bias: bool, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weights, biases = (torch.randn(shape, generator=generator) for shape in ((6, 8), (4, 5, 8), (4, 5)))
    if transposed:
        weights = weights.mT.contiguous().mT
    counts, y = [2, 0, 3, 1], torch.full((6, 5), torch.nan)
    done = 0
    for i in linear_of_each(x, weights, biases if with_bias else None, counts, y):
        own = slice(done, done := done + counts[i])
        torch.testing.assert_close(y[own], x[own] @ weights[i].T + (biases[i] if with_bias else 0))
        assert y[done:].isnan().all()
    assert done == len(x)
