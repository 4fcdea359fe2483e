import pytest
import torch

from lorry.actors.model.agreement import agree

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e3])
def test_results_that_differ_by_rounding_agree_whatever_their_size(dtype: torch.dtype, size: float) -> None:
    exact = torch.randn(64, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * size
    noise = torch.randn(64, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rounded = exact * (1 + 4 * torch.finfo(dtype).eps * noise)
    assert agree(rounded.to(dtype), exact.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_that_differ_by_more_than_rounding_do_not(dtype: torch.dtype) -> None:
    expected = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    for wrong in (expected * 1.2, expected.roll(1, 0), torch.zeros_like(expected), expected * float("nan")):
        assert not agree(wrong, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_operations_are_forgiven_less(dtype: torch.dtype) -> None:
    expected = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    capped = (5 * expected.double() / 30).tanh() * 6
    assert agree(expected, expected, same_operations=True)
    assert not agree(capped.to(dtype), expected, same_operations=True)
