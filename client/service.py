"""The way in: connect, then create training and sampling clients."""

import logging
import secrets
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from ..wire.catalogue_messages import Query
from ..wire.client_messages import CreateRun, RunCreated
from ..wire.commands import check_lora_config
from ..wire.ids import ProjectId, RunId
from ..wire.news import Followed
from ..wire.tracing import tracing
from ..wire.types import ExpertLora, GetServerCapabilitiesResponse, LoraConfig
from .connection import Connection, open_connection
from .following import Feed
from .rest import RestClient
from .sampling import SamplingClient, create_sampler
from .training import TrainingClient

log = logging.getLogger("lorry")


class ServiceClient:
    """What it makes is in `project`, which is made if new."""

    def __init__(self, connection: Connection, project: str | None = None) -> None:
        self._connection = connection
        self._project = ProjectId(project) if project is not None else None

    async def get_server_capabilities_async(self) -> GetServerCapabilitiesResponse:
        query = Query(self._connection.next_request(), "capabilities")
        return await self._connection.ask(query, GetServerCapabilitiesResponse)

    async def create_lora_training_client_async(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: dict[str, str] | None = None,
        expert_lora: ExpertLora = "shared",
        priority: int = 0,
    ) -> TrainingClient:
        """A new run: an adapter that starts as PEFT's do (A random by `seed`, B zero), so it changes nothing yet.

        With `train_mlp` the routed experts of a mixture are trained, too: `shared` has A of gate and up and B of down
        once for all experts of a layer, as the hosted service has; `independent` a pair for each, which is several
        times the parameters.

        Of a tenant's runs that wait, those of the highest `priority`, from -100 to 100, go first.

        Waits while the model is being loaded. Raises UnknownModelError, InvalidRequestError, and UnsupportedModelError
        for a model that cannot be loaded.
        """
        lora = LoraConfig(
            rank=rank,
            seed=seed,
            train_mlp=train_mlp,
            train_attn=train_attn,
            train_unembed=train_unembed,
            expert_lora=expert_lora,
        )
        check_lora_config(lora)
        nonce = secrets.token_hex(16)
        number, metadata = self._connection.next_request(), user_metadata or {}
        request = CreateRun(number, nonce, base_model, lora, metadata, project=self._project, priority=priority)
        created = await self._connection.ask(request, RunCreated)
        training = TrainingClient(self._connection, RunId(created.run))
        await training.get_info_async()
        return training

    async def create_sampling_client_async(
        self, model_path: str | None = None, base_model: str | None = None, priority: int = 0
    ) -> SamplingClient:
        """Of saved weights (`tinker://RUN/sampler_weights/NAME`) or of a bare base model: give one of the two."""
        return await create_sampler(
            self._connection, base_model=base_model, model_path=model_path, project=self._project, priority=priority
        )

    def follow(self, of: Followed = "own") -> AbstractAsyncContextManager[Feed]:
        """`async with service.follow() as feed: async for news in feed`: what goes on in the tenant's runs, or in the
        deployment, as it happens. Raises PermissionDeniedError."""
        return self._connection.follow(of)

    def create_rest_client(self) -> RestClient:
        return RestClient(self._connection)


@asynccontextmanager
async def connect(
    address: str,
    *,
    api_key: str,
    server_key: str | None = None,
    timeout_s: float = 10.0,
    project: str | None = None,
) -> AsyncGenerator[ServiceClient]:
    """A service client, for as long as the block lasts. What it makes is in `project`, which is made if new.

    `server_key` is the server's public CURVE key, which `lorry serve` prints where it listens beyond loopback.
    Raises AuthenticationError, ProtocolError, and ConnectionLostError where nobody answers within `timeout_s` seconds.
    """
    if problem := tracing.start("lorry-client"):
        log.warning(problem)
    async with open_connection(address, api_key, server_key, timeout_s) as connection:
        yield ServiceClient(connection, project)
