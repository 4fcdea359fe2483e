"""What tokens cost: prices by model and kind, and the cost of a number of tokens.

In whole numbers, so that sums are exact: a price is in micro-dollars per million tokens, and so a cost is in millionths
of a micro-dollar.
"""

import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import msgspec

from ...wire.errors import InvalidRequestError
from ...wire.types import UsageKind

EVERY_OTHER = "*"
"""What the file calls the models that it does not name."""
_MOST_USD = 1e4
"""A cent a token: with any more, what one command can cost would not fit where it is written down."""
_STORAGE = "storage_usd_per_gb_month"
_CACHED = 0.2
"""Of what a computed prompt costs: what one that was found computed does, where nothing else was said."""


class ModelPrices(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """USD per million tokens, as in the file. Without a price of their own, cached prompts cost a fifth of others."""

    prefill: float = 0.0
    cached_prefill: float | None = None
    sample: float = 0.0
    train: float = 0.0


_FREE = ModelPrices()


@dataclass(frozen=True, slots=True)
class Prices:
    """By the public names of models; without any, all is free."""

    by_model: Mapping[str, ModelPrices] = field(default_factory=dict[str, ModelPrices])
    storage_usd_per_gb_month: float = 0.0

    @property
    def storage(self) -> int:
        """Micro-dollars for a GB, 10**9 bytes, and a month of 720 hours."""
        return round(self.storage_usd_per_gb_month * 1e6)

    def of(self, model: str, kind: UsageKind) -> int:
        """Micro-dollars per million tokens."""
        prices = self._found(model) or _FREE
        usd = getattr(prices, kind)
        return round((prices.prefill * _CACHED if usd is None else usd) * 1e6)

    def unknown(self, models: Iterable[str]) -> list[str]:
        """Those of which nothing is said, where something is said of others: they cost nothing."""
        return [model for model in models if self.by_model and self._found(model) is None]

    def _found(self, model: str) -> ModelPrices | None:
        """Under its whole name; under the part that a hub's id ends with; or under that of all others."""
        named = (self.by_model.get(name) for name in (model, model.rpartition("/")[2], EVERY_OTHER))
        return next((prices for prices in named if prices is not None), None)


def cost(tokens: int, price: int) -> int:
    """Of `tokens` at `price` micro-dollars per million, in millionths of a micro-dollar."""
    return tokens * price


def parse_prices(text: str) -> Prices:
    """TOML: a table for each model, with `prefill`, `cached_prefill`, `sample` and `train`; `["*"]` for all others; and
    before these, if it costs anything, `storage_usd_per_gb_month`.

    Raises InvalidRequestError.
    """
    try:
        said = tomllib.loads(text)
        storage = msgspec.convert(said.pop(_STORAGE, 0.0), float, strict=False)
        by_model = msgspec.convert(said, dict[str, ModelPrices], strict=False)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise InvalidRequestError(f"prices: {error}", field="prices") from None
    if not (math.isfinite(storage) and 0 <= storage <= _MOST_USD):
        raise InvalidRequestError.of(f"prices.{_STORAGE}", storage, "USD for a GB and a month, from 0 to 10,000")
    for model, prices in by_model.items():
        for kind in ModelPrices.__struct_fields__:
            usd = getattr(prices, kind)
            if usd is not None and not (math.isfinite(usd) and 0 <= usd <= _MOST_USD):
                raise InvalidRequestError.of(
                    f"prices[{model!r}].{kind}", usd, "USD per million tokens, from 0 to 10,000"
                )
    return Prices(by_model, storage)
