"""What tokens cost: prices by model and kind, and the cost of a number of tokens.

In whole numbers, so that sums are exact: a price is in micro-dollars per million tokens, and so a cost is in millionths
of a micro-dollar.
"""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from ...wire.errors import InvalidRequestError
from ...wire.types import UsageKind

EVERY_OTHER = "*"
"""What the file calls the models that it does not name."""
_MOST_USD = 1e6


class ModelPrices(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """USD per million tokens, as in the file. Without one of their own, cached prompts cost what computed ones do."""

    prefill: float = 0.0
    cached_prefill: float | None = None
    sample: float = 0.0
    train: float = 0.0


_FREE = ModelPrices()


@dataclass(frozen=True, slots=True)
class Prices:
    """By the public names of models; without any, all is free."""

    by_model: Mapping[str, ModelPrices] = field(default_factory=dict[str, ModelPrices])

    def of(self, model: str, kind: UsageKind) -> int:
        """Micro-dollars per million tokens."""
        prices = self.by_model.get(model) or self.by_model.get(EVERY_OTHER, _FREE)
        usd = getattr(prices, kind)
        return round((prices.prefill if usd is None else usd) * 1e6)


def cost(tokens: int, price: int) -> int:
    """Of `tokens` at `price` micro-dollars per million, in millionths of a micro-dollar."""
    return tokens * price


def parse_prices(text: str) -> Prices:
    """TOML: a table for each model, with `prefill`, `cached_prefill`, `sample` and `train`; `["*"]` for all others.

    Raises InvalidRequestError.
    """
    try:
        by_model = msgspec.convert(tomllib.loads(text), dict[str, ModelPrices], strict=False)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise InvalidRequestError(f"prices: {error}", field="prices") from None
    for model, prices in by_model.items():
        for kind in ModelPrices.__struct_fields__:
            usd = getattr(prices, kind)
            if usd is not None and not (math.isfinite(usd) and 0 <= usd <= _MOST_USD):
                raise InvalidRequestError.of(
                    f"prices[{model!r}].{kind}", usd, "USD per million tokens, from 0 to 10**6"
                )
    return Prices(by_model)
