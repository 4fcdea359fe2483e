import pytest
import torch

from lorry.actors.model import products
from lorry.actors.model.products import linear_float32


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
