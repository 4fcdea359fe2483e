"""The whole service embedded: the same processes as `lorry serve`, for as long as a block of code lasts."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from lorry.actors.config import ActorSettings
from lorry.client import ServiceClient, connect
from lorry.config import DEMO_SETTINGS, ModelConfig, ServeConfig, demo_model
from lorry.serve import serving


@asynccontextmanager
async def local(
    model: str | Path | None = None,
    *,
    data: Path | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    log_level: str = "warning",
    project: str | None = None,
) -> AsyncGenerator[ServiceClient]:
    """A service client of a broker and an actor of its own: `model` is a folder, a hub id, or NAME=either; without one
    it is the demo's, `jargon-1m`.

    What it saves lies in `data`, or in a temporary folder that goes when the block ends. `project` as in `connect`.
    """
    with TemporaryDirectory(prefix="lorry-", ignore_cleanup_errors=True) as temporary:
        config = ServeConfig(
            models=(demo_model() if model is None else ModelConfig.parse(str(model)),),
            data=data or Path(temporary),
            bind="tcp://127.0.0.1:*",
            actor=replace(ActorSettings() if model else DEMO_SETTINGS, device=device, dtype=dtype),
            log_level=log_level,
            grace_s=ServeConfig.grace_s if data else 0,  # what nobody will read is not saved
        )
        async with serving(config) as deployment:
            key = await deployment.create_key("local")
            async with connect(deployment.address, api_key=key, project=project) as service:
                yield service
