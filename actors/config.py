"""An actor's settings. Every field has a default that works on a laptop, and its unit in its name."""

from dataclasses import dataclass, field
from typing import Annotated

from msgspec import Meta

from ..wire.ids import ActorId
from ..wire.types import FileLayout, Quantization


@dataclass(frozen=True, slots=True)
class ActorSettings:
    """What an operator may set, and the only list of it: the command line's options are made of these fields.

    `sample_share` is the least part of the device's time that decoding gets while training waits too. `kv_cache_bytes`
    None is a tenth of the host's memory, or on an accelerator two fifths of what the model leaves free. `host_memory`
    None is a quarter of the host's memory.
    """

    device: Annotated[
        str, Meta(description="cpu, cuda, cuda:1, ...; to lorry serve also cuda:0-7, which actors take in turn")
    ] = "cpu"
    dtype: Annotated[
        str, Meta(description="The base model's: auto (its checkpoint's own), float32, bfloat16, float16")
    ] = "auto"
    quantize: Annotated[
        Quantization,
        Meta(
            description="The base model's linear layers and experts: nf4, in 4 bits by bitsandbytes; none, as they are"
        ),
    ] = "none"
    tensor_parallel: Annotated[
        int, Meta(ge=1, description="Devices that share the base model: the one of --device, and those that follow")
    ] = 1
    trust_remote_code: Annotated[
        bool, Meta(description="Run the code that lies beside a model's weights or tokenizer, where it has some")
    ] = False
    adapter_layout: Annotated[
        FileLayout,
        Meta(description="Of saved adapters: peft, as PEFT and vLLM load them; tinker, the hosted service's keys"),
    ] = "peft"
    slots: Annotated[
        int, Meta(ge=1, description="Adapters on the device at a time; more are swapped to host memory")
    ] = 16
    host_memory: Annotated[
        int | None,
        Meta(
            ge=1,
            description="Bytes that adapters may take of it; more are kept on disk [default: a quarter of the host's]",
        ),
    ] = None
    recovery_s: Annotated[
        float,
        Meta(ge=0.0, description="Seconds of the device that rebuilding a run may cost; its state is saved in time"),
    ] = 20.0
    idle_save_s: Annotated[
        float, Meta(ge=0.0, description="After how many seconds without a change a run's state is saved")
    ] = 60.0
    token_budget: Annotated[int, Meta(ge=1, description="Tokens in one pass through the model")] = 8192
    pass_bytes: Annotated[
        int | None,
        Meta(
            ge=1,
            description="Bytes that a training pass may hold: of larger ones layers are computed again "
            "[default: what a GPU has free, or a quarter of the host's memory]",
        ),
    ] = None
    sample_rows: Annotated[int, Meta(ge=1, description="Sequences that decode together")] = 64
    prefill_chunk: Annotated[
        int, Meta(ge=1, description="Tokens of prompts that are computed beside a decode step")
    ] = 512
    kv_cache_bytes: Annotated[
        int | None,
        Meta(
            ge=1,
            description="What keys and values may take [default: a tenth of the host's memory, or 2/5 of a GPU's free]",
        ),
    ] = None
    image_pixels: Annotated[
        int, Meta(ge=1, description="Of an image, at most: larger ones are refused before they are decoded")
    ] = 2**25
    image_cache_bytes: Annotated[
        int, Meta(ge=0, description="What is kept of images that were seen, on the device, should they come again")
    ] = 2**28
    sample_share: Annotated[
        float,
        Meta(ge=0.01, le=0.99, description="Of the device's time, what sampling gets while training waits too"),
    ] = 0.5
    hang_s: Annotated[
        float,
        Meta(
            ge=0.1,
            description="Seconds without progress after which an actor is replaced; more where its work takes long",
        ),
    ] = 60.0
    compile: Annotated[
        bool,
        Meta(
            description="Sample and train faster, by torch.compile; an actor takes longer to start, the first a minute"
        ),
    ] = False
    threads: Annotated[
        int | None, Meta(ge=1, description="CPU threads of each actor [default: torch's own choice]")
    ] = None


@dataclass(frozen=True, slots=True)
class ActorConfig:
    """`model` is a local folder or a hub id, served under the public name `base_model`.

    `server_key` is the broker's public CURVE key, where its actors' address is beyond loopback.
    """

    actor: ActorId
    base_model: str
    model: str
    connect: str
    token: str = field(repr=False)
    server_key: str | None = None
    settings: ActorSettings = field(default_factory=ActorSettings)
    max_rank: int = 256
