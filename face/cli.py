"""The `lorry` command. Each subcommand parses its arguments into a configuration and calls one function."""

import os
import secrets
import sys
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

import anyio
import typer
from rich.console import Console

from lorry import logs
from lorry.config import ModelConfig, ServeConfig, default_data, read_prices
from lorry.scheduler.config import BrokerConfig
from lorry.scheduler.planning.prices import Prices
from lorry.wire.errors import InvalidRequestError, LorryError
from lorry.wire.ids import ActorId
from lorry.wire.sockets import CurveKeys

app = typer.Typer(
    help="One base model, many LoRAs on board: train and sample LoRA adapters of many tenants on shared base models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
keys = typer.Typer(help="API keys: every client needs one.", no_args_is_help=True)
app.add_typer(keys, name="keys")

_Data = Annotated[
    Path | None,
    typer.Option(
        "--data", help="Where the database and checkpoints lie [default: $LORRY_DATA or the user's data folder]"
    ),
]
_Models = Annotated[
    list[str],
    typer.Option("--model", help="[NAME=]PATH_OR_HUB_ID: a folder or hub id, and the public name to serve it under"),
]
_Bind = Annotated[str, typer.Option(help="Where clients connect, as tcp://HOST:PORT; beyond loopback it is encrypted")]
_Http = Annotated[str, typer.Option(help="Where scripts written for the Tinker SDK connect, as HOST:PORT")]
_Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
_Dtype = Annotated[str, typer.Option(help="The base model's: auto (its checkpoint's own), float32, bfloat16, float16")]
_Slots = Annotated[int, typer.Option(min=1, help="Adapters on the device at a time; more are swapped to host memory")]
_Budget = Annotated[int, typer.Option(min=1, help="Tokens in one pass through the model")]
_Rows = Annotated[int, typer.Option(min=1, help="Sequences that decode together")]
_Chunk = Annotated[int, typer.Option(min=1, help="Tokens of prompts that are computed beside a decode step")]
_KVCache = Annotated[
    int | None,
    typer.Option(
        min=1, help="What keys and values may take [default: a tenth of the host's memory, or 2/5 of a GPU's free]"
    ),
]
_Share = Annotated[
    float, typer.Option(min=0.01, max=0.99, help="Of the device's time, what sampling gets while training waits too")
]
_Compile = Annotated[
    bool,
    typer.Option("--compile", help="Sample faster, by torch.compile; actors take up to a minute to start"),
]
_Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of each actor [default: torch's own choice]")]
_Heartbeat = Annotated[float, typer.Option(min=0.05, help="Seconds between signs of life; three missed are a death")]
_Prices = Annotated[
    Path | None, typer.Option(help="TOML, USD per million tokens: ['NAME'] prefill = 0.1, sample = 0.4, train = 0.4")
]
_Supervised = Annotated[bool, typer.Option(hidden=True, help="Stop when standard input closes")]


@app.callback()
def main(
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error; logs go to standard error")] = "info",
) -> None:
    """One base model, many LoRAs on board."""
    if log_level not in ("debug", "info", "warning", "error"):
        raise typer.BadParameter(f"{log_level!r} is none of debug, info, warning, error", param_hint="--log-level")
    logs.configure(log_level)
    os.environ["LORRY_LOG_LEVEL"] = log_level


@app.command()
def serve(
    model: _Models,
    data: _Data = None,
    bind: _Bind = "tcp://127.0.0.1:5570",
    http: _Http = "127.0.0.1:8000",
    no_http: Annotated[bool, typer.Option("--no-http", help="Serve Lorry's own clients only")] = False,
    device: _Device = "cpu",
    dtype: _Dtype = "auto",
    replicas: Annotated[int, typer.Option(min=1, help="Actors for each model")] = 1,
    slots: _Slots = 16,
    token_budget: _Budget = 8192,
    sample_rows: _Rows = 64,
    prefill_chunk: _Chunk = 512,
    kv_cache_bytes: _KVCache = None,
    sample_share: _Share = 0.5,
    compile_: _Compile = False,
    threads: _Threads = None,
    prices: _Prices = None,
    heartbeat_s: _Heartbeat = 5.0,
) -> None:
    """Serve base models: starts a broker, a gateway and an actor for each model as child processes."""
    from lorry.serve import serving

    async def run() -> None:
        config = ServeConfig(
            models=tuple(ModelConfig.parse(text) for text in model),
            data=data or default_data(),
            bind=bind,
            http=None if no_http else http,
            device=device,
            dtype=dtype,
            replicas=replicas,
            slots=slots,
            token_budget=token_budget,
            sample_rows=sample_rows,
            prefill_chunk=prefill_chunk,
            kv_cache_bytes=kv_cache_bytes,
            sample_share=sample_share,
            compile=compile_,
            threads=threads,
            prices=prices,
            heartbeat_s=heartbeat_s,
            log_level=os.environ["LORRY_LOG_LEVEL"],
        )
        console = Console()
        with console.status("Loading the models…") as progress:
            async with serving(config) as deployment:
                progress.stop()
                names = ", ".join(model.name for model in config.models)
                console.print(f"Serving {names} at {deployment.address}, data in {config.data}. Ctrl-C stops it.")
                if deployment.url:
                    console.print(f"Scripts for Tinker run with TINKER_BASE_URL={deployment.url}")
                if deployment.server_key:
                    console.print(f"Clients pass server_key={deployment.server_key!r}: the connection is encrypted.")
                await anyio.sleep_forever()

    _run(run)


@app.command()
def broker(
    model: Annotated[list[str], typer.Option("--model", help="Public name of a base model that actors will serve")],
    data: _Data = None,
    bind: _Bind = "tcp://127.0.0.1:5570",
    actor_bind: Annotated[
        str, typer.Option(help="Where actors connect; beyond loopback it is encrypted")
    ] = "tcp://127.0.0.1:*",
    prices: _Prices = None,
    heartbeat_s: _Heartbeat = 5.0,
    supervised: _Supervised = False,
) -> None:
    """Run a broker alone; actors join it with the token in LORRY_ACTOR_TOKEN."""
    from lorry.processes import run_broker

    folder = data or default_data()
    _run(
        lambda: run_broker(
            BrokerConfig(
                data=folder,
                models=tuple(model),
                actor_token=_actor_token(),
                bind=bind,
                actor_bind=actor_bind,
                curve=None if is_loopback(bind) else curve_keys(folder),
                actor_curve=None if is_loopback(actor_bind) else curve_keys(folder),
                heartbeat_s=heartbeat_s,
                prices=read_prices(prices) if prices else Prices(),
            ),
            supervised,
        )
    )


@app.command()
def actor(
    model: Annotated[str, typer.Option("--model", help="[NAME=]PATH_OR_HUB_ID")],
    connect: Annotated[str, typer.Option(help="The broker's address for actors")],
    name: Annotated[str, typer.Option(help="Unique among the broker's actors")] = "actor",
    device: _Device = "cpu",
    dtype: _Dtype = "auto",
    slots: _Slots = 16,
    token_budget: _Budget = 8192,
    sample_rows: _Rows = 64,
    prefill_chunk: _Chunk = 512,
    kv_cache_bytes: _KVCache = None,
    sample_share: _Share = 0.5,
    compile_: _Compile = False,
    threads: _Threads = None,
    server_key: Annotated[str | None, typer.Option(help="The broker's public key, where it is not on loopback")] = None,
    supervised: _Supervised = False,
) -> None:
    """Run one actor alone, and join the broker at CONNECT with the token in LORRY_ACTOR_TOKEN."""
    from lorry.actors.config import ActorConfig
    from lorry.processes import run_actor

    parsed = ModelConfig.parse(model)
    config = ActorConfig(
        actor=ActorId(name),
        base_model=parsed.name,
        model=parsed.source,
        connect=connect,
        token=_actor_token(),
        server_key=server_key,
        device=device,
        dtype=dtype,
        slots=slots,
        token_budget=token_budget,
        sample_rows=sample_rows,
        prefill_chunk=prefill_chunk,
        kv_cache_bytes=kv_cache_bytes,
        sample_share=sample_share,
        compile=compile_,
        threads=threads,
    )
    _run(lambda: run_actor(config, supervised))


@app.command()
def gateway(
    connect: Annotated[str, typer.Option(help="The broker's address for clients")] = "tcp://127.0.0.1:5570",
    http: _Http = "127.0.0.1:8000",
    data: Annotated[
        Path | None, typer.Option("--data", help="The broker's data folder, to download checkpoints from")
    ] = None,
    server_key: Annotated[str | None, typer.Option(help="The broker's public key, where it is not on loopback")] = None,
    url: Annotated[str | None, typer.Option(help="How clients reach this gateway, if by another address")] = None,
    supervised: _Supervised = False,
) -> None:
    """Run a gateway alone: the HTTP server for the Tinker SDK, a client of the broker at CONNECT."""
    from lorry.gateway.config import GatewayConfig
    from lorry.processes import run_gateway

    host, port = host_and_port(http)
    config = GatewayConfig(
        connect=connect,
        host=host,
        port=port,
        server_key=server_key,
        checkpoints=data / "checkpoints" if data else None,
        link_key=link_key(data) if data else b"",
        url=url,
    )
    _run(lambda: run_gateway(config, supervised), uvloop=True)


@keys.command("create")
def keys_create(
    tenant: Annotated[str, typer.Option(help="Who uses the key; made if new")],
    data: _Data = None,
) -> None:
    """Print a new API key of TENANT. It is shown this once: only its hash is stored."""
    from lorry.serve import create_key

    async def run() -> None:
        print(await create_key(data or default_data(), tenant))

    _run(run)


@app.command()
def usage(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's")] = None,
    data: _Data = None,
) -> None:
    """Print tokens and their cost by tenant, run and kind (prefill, cached_prefill, sample, train)."""
    from lorry.reports import print_usage

    _call(lambda: print_usage(_plain_console(), data or default_data(), tenant))


@app.command()
def status(data: _Data = None) -> None:
    """Print actors, runs, queues and tenants."""
    from lorry.reports import print_status

    _call(lambda: print_status(_plain_console(), data or default_data()))


def _plain_console() -> Console:
    """Names are printed as they are: without this, rich makes a picture of the middle of `SESSION:train:0`."""
    return Console(emoji=False, markup=False)


def host_and_port(http: str) -> tuple[str, int]:
    host, _, port = http.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidRequestError.of("http", http, "HOST:PORT")
    return host.strip("[]"), int(port)


def link_key(data: Path) -> bytes:
    """What signs the links to downloads, made once and kept in the data folder, so that gateways agree on it."""
    file = data / "links.key"
    if not file.exists():
        data.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        file.write_bytes(secrets.token_bytes(32))
    return file.read_bytes()


def is_loopback(bind: str) -> bool:
    """Whether ipc://PATH or tcp://HOST:PORT is reached from this machine alone; InvalidRequestError otherwise."""
    if bind.startswith("ipc://"):
        return True
    host = bind.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    if not bind.startswith("tcp://") or not host:
        raise InvalidRequestError.of("bind", bind, "tcp://HOST:PORT")
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def curve_keys(data: Path) -> CurveKeys:
    """The server's key pair, made once and kept in the data folder, so that clients can rely on it."""
    file = data / "curve.key"
    if file.exists():
        return CurveKeys(*file.read_bytes().split())
    pair = CurveKeys.generate()
    data.mkdir(parents=True, exist_ok=True)
    file.touch(mode=0o600)
    file.write_bytes(pair.public + b"\n" + pair.secret + b"\n")
    return pair


def _actor_token() -> str:
    if token := os.environ.get("LORRY_ACTOR_TOKEN"):
        return token
    raise InvalidRequestError.of("LORRY_ACTOR_TOKEN", "", "a secret that the broker and its actors share")


def _run(work: Callable[[], Awaitable[None]], *, uvloop: bool = False) -> None:
    async def awaited() -> None:
        await work()

    _call(lambda: anyio.run(awaited, backend_options={"use_uvloop": uvloop}))


def _call(work: Callable[[], None]) -> None:
    """Errors that the user can act on become one line and an exit status; anything else is a traceback."""
    from lorry.serve import CONFIGURATION_EXIT

    try:
        work()
    except KeyboardInterrupt:
        sys.exit(130)
    except (LorryError, BaseExceptionGroup) as error:
        leaf: BaseException = error
        while isinstance(leaf, BaseExceptionGroup):
            leaf = leaf.exceptions[0]
        if not isinstance(leaf, LorryError):
            raise
        Console(stderr=True).print(f"[red]lorry:[/] {leaf}", highlight=False, soft_wrap=True)
        sys.exit(CONFIGURATION_EXIT if leaf.category == "user" else 1)
