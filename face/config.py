"""What a deployment on one machine is made of. Every field has a default that works on a laptop."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import structlog
from platformdirs import user_data_path

from lorry.actors.config import ActorSettings
from lorry.gateway.config import HttpSettings
from lorry.scheduler.planning.prices import Prices, parse_prices
from lorry.wire.errors import InvalidRequestError

log = structlog.get_logger("lorry")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """`source`, a local folder or a hub id, is served under the public `name`."""

    name: str
    source: str

    @classmethod
    def parse(cls, text: str) -> "ModelConfig":
        """`NAME=SOURCE`, or SOURCE alone: then a folder's last part, or the hub id itself, is the name."""
        name, given, source = text.partition("=")
        if not given:
            source = text
            name = Path(text).resolve().name if os.path.isdir(text) else text
        if not name or not source:
            raise InvalidRequestError.of("model", text, "NAME=PATH_OR_HUB_ID or PATH_OR_HUB_ID")
        if "=" not in text and (text.startswith((".", "/", "~")) and not os.path.isdir(text)):
            raise InvalidRequestError.of("model", text, "a folder that exists, or a hub id")
        return cls(name, source)

    def check_there(self) -> None:
        """What can be seen of it without loading it. An actor does not ask: it tells its broker what it finds, so that
        nobody waits for it. Raises InvalidRequestError."""
        said = f"{self.name}={self.source}"
        if os.path.isdir(self.source):
            if not os.path.isfile(os.path.join(self.source, "config.json")):
                raise InvalidRequestError.of("model", said, "a folder with a config.json, as transformers saves one")
        elif self.source.startswith((".", "/", "~")) or self.source.count("/") > 1:
            raise InvalidRequestError.of("model", said, "a folder that exists, or a hub id")


def demo_model() -> ModelConfig:
    """The model of 1.4 million parameters that ships with Lorry, trained on the Jargon File."""
    return ModelConfig("jargon-1m", str(files("lorry.demo_model")))


DEMO_SETTINGS = ActorSettings(threads=1)
"""So small a model gains nothing from a second thread, and loses much where another process is busy."""


def default_data() -> Path:
    """LORRY_DATA, or the user's data folder."""
    return Path(os.environ["LORRY_DATA"]) if "LORRY_DATA" in os.environ else user_data_path("lorry")


def read_prices(named: str) -> Prices:
    """A list that ships with Lorry, by its name, or a file. Raises InvalidRequestError for a file that cannot be read,
    or says something else."""
    lists = files("lorry") / "price_lists"
    shipped = {file.name.removesuffix(".toml"): file for file in lists.iterdir()}
    try:
        return parse_prices(shipped.get(named, Path(named)).read_text(encoding="utf-8"))
    except OSError as error:
        wanted = f"{' or '.join(sorted(shipped))}, or a file that can be read ({error.strerror})"
        raise InvalidRequestError.of("prices", named, wanted) from None


def chosen_prices(named: str | None, models: Iterable[str]) -> Prices:
    """As `read_prices`, or none; the log tells which models are not among them."""
    prices = read_prices(named) if named else Prices()
    for model in prices.unknown(models):
        log.warning("no price is known: its tokens cost nothing", base_model=model, prices=named)
    return prices


def parse_weights(said: Iterable[str] | None, models: Iterable[str]) -> dict[str, float]:
    """NAME=WEIGHT each. Raises InvalidRequestError."""
    weights, served = dict[str, float](), set(models)
    for text in said or ():
        name, _, weight = text.rpartition("=")
        try:
            weights[name] = float(weight)
        except ValueError:
            raise InvalidRequestError.of("model_weight", text, "NAME=WEIGHT") from None
        if name not in served:
            raise InvalidRequestError.of("model_weight", text, f"one of {', '.join(sorted(served))}, =WEIGHT")
        if not 1e-3 <= weights[name] <= 1e3:
            raise InvalidRequestError.of("model_weight", text, "a weight from 0.001 to 1,000")
    return weights


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """`replicas` actors for each model, all with the settings `actor`, but for `settings_for` some of them: see
    `placement`. See BrokerConfig for the fields it takes over.

    `http` is HOST:PORT for clients of the Tinker SDK, port 0 for any that is free; None serves none. `prices` is a
    list's name or a TOML file, see `read_prices`; without it, costs are zero. Actors have `grace_s` to end what they
    hold and save their runs when the deployment stops; 0 does not ask them to.
    """

    models: tuple[ModelConfig, ...]
    data: Path
    bind: str = "tcp://127.0.0.1:5570"
    http: str | None = None
    replicas: int = 1
    actor: ActorSettings = field(default_factory=ActorSettings)
    prices: str | None = None
    heartbeat_s: float = 5.0
    grace_s: float = 30.0
    log_level: str = "info"
    settings_for: tuple[str, ...] = ()
    spread_after_s: float = 10.0
    model_weights: Mapping[str, float] = field(default_factory=dict[str, float])
    http_settings: HttpSettings = field(default_factory=HttpSettings)
    sessions_per_tenant: int = 500
