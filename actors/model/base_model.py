"""Loads the frozen base model that all adapters share, and refuses one that packed execution would get wrong.

It knows nothing of adapters, batches or caches.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...wire.errors import UnsupportedModelError
from ...wire.types import Quantization
from ..images.eyes import CACHE_BYTES, MAX_PIXELS, Eyes, eyes_of
from ..images.layout import Seen
from .agreement import agree
from .attention import PACKED, PROBED, set_attention, set_decoders_attention
from .in_flight import InFlight
from .leading import Division, Lead
from .loading import auto_class, load_model
from .probe import AttentionProbe
from .recomputing import let_layers_be_computed_again

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True)
class BaseModel:
    """`model` is frozen, in eval mode, and attends within the sequences that `in_flight.lengths` names. Without `eyes`
    it reads text alone. The first of its `layers` can be computed again in a backward, as many as `in_flight` says.
    `division`: its layers are shared among several devices, and this is one's part."""

    model: "PreTrainedModel"
    in_flight: InFlight
    vocab_size: int
    max_context: int
    end_tokens: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    eyes: Eyes | None = None
    layers: int = 0
    division: Division | None = None

    def hidden_states(self, tokens: Tensor, positions: Tensor, *, grad: bool, seen: Seen | None = None) -> Tensor:
        """tokens [tokens], positions [tokens] or [3, tokens] int64 -> [tokens, hidden], after the final norm: what the
        output head takes. Tokens of images, which `seen` has, may be any.

        With `grad` the autograd graph spans the whole decoder, from the input embeddings on; the embeddings themselves
        are detached. Fill `in_flight` first.
        """
        with torch.set_grad_enabled(grad):
            if not grad and seen is None:
                return self.run_decoder(tokens, positions)
            embeddings: Tensor = self.model.get_input_embeddings()(tokens.unsqueeze(0))  # [1, tokens, hidden]
            if seen is not None:
                embeddings = embeddings.index_copy(1, seen.places, seen.embeddings.to(self.dtype).unsqueeze(0))
            return self._decode(embeddings.detach().requires_grad_(grad), positions, seen)

    def run_decoder(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """As `hidden_states`, in whatever mode of autograd the caller is."""
        return self._decode(self.model.get_input_embeddings()(tokens.unsqueeze(0)), positions)

    def _decode(self, embeddings: Tensor, positions: Tensor, seen: Seen | None = None) -> Tensor:
        decoder, added = self.model.get_decoder(), {}
        if seen is not None:
            is_image = torch.zeros(embeddings.shape[:2], dtype=torch.bool, device=self.device)
            is_image[0, seen.places] = True
            added = {"visual_pos_masks": is_image, "deepstack_visual_embeds": list(seen.layers)}
        places = positions.unsqueeze(-2)  # [1, tokens] or [3, 1, tokens]
        output = decoder(inputs_embeds=embeddings, position_ids=places, use_cache=False, **added)
        return output.last_hidden_state.squeeze(0)

    def logits(self, hidden: Tensor) -> Tensor:
        """The output head: hidden [rows, hidden] -> [rows, vocab]. `in_flight.segments` must describe these rows."""
        head = self.model.get_output_embeddings()  # looked up, because LoRA may have replaced it
        assert head is not None, "wrap_model refuses a model without one"
        if self.division is None or self.division.ranks.state == "alone":
            return head(hidden)
        return self.division.ranks.gathered(head(hidden), self.division.widths)

    @property
    def lead(self) -> Lead | None:
        """The others' that have parts of it, where this is the first of them."""
        return None if self.division is None else self.division.lead

    def alone(self) -> AbstractContextManager[None]:
        """Inside, the model may be run for the shapes of what it computes, whoever else has a part of it."""
        return nullcontext() if self.division is None else self.division.ranks.alone()


def load_base_model(
    path: str | Path,
    device: str = "cpu",
    dtype: str = "auto",
    *,
    trust_remote_code: bool = False,
    quantize: Quantization = "none",
    max_pixels: int = MAX_PIXELS,
    image_cache_bytes: int = CACHE_BYTES,
) -> BaseModel:
    """Loads any decoder that transformers knows from a local folder or a hub id, as `load_model` does, with its eyes
    where they are known to be right; see `Eyes`.

    Raises UnsupportedModelError where there is no such model, none that runs packed, or one that needs code of its own.
    """
    model = load_model(path, dtype, trust_remote_code=trust_remote_code, quantize=quantize, device=device)
    if quantize == "none":
        model.to(device)  # pyright: ignore[reportArgumentType]
    return wrap_model(model, eyes_of(model, path, max_pixels, image_cache_bytes))


def wrap_model(model: "PreTrainedModel", eyes: Eyes | None = None) -> BaseModel:
    """Freezes `model` in place, gives it packed attention and tries both once, on a few tokens.

    Raises UnsupportedModelError where the model would compute something else packed than it does alone.
    """
    name, config, head = type(model).__name__, model.config.get_text_config(), model.get_output_embeddings()
    if getattr(model, "_is_stateful", False) or not hasattr(config, "max_position_embeddings"):
        raise UnsupportedModelError(f"{name} is not a decoder of attention layers and positions alone")
    if not isinstance(head, nn.Linear):
        raise UnsupportedModelError(f"{name} has a {type(head).__name__} for an output head, not a Linear")
    in_flight = InFlight()
    _prepare(model, in_flight)
    base = BaseModel(
        model,
        in_flight,
        vocab_size=min(head.out_features, config.vocab_size),
        max_context=config.max_position_embeddings,
        end_tokens=_end_tokens(model),
        device=model.device,
        dtype=model.dtype,
        eyes=eyes,
        layers=let_layers_be_computed_again(model, in_flight),
    )
    _probe(base)
    return base


def outline(config: "PreTrainedConfig", dtype: torch.dtype) -> BaseModel:
    """One that `wrap_model` would take, on the meta device: without weights, and untried."""
    device, text, in_flight = torch.device("meta"), config.get_text_config(), InFlight()
    with device:
        model = auto_class(config).from_config(config, dtype=dtype)
    _prepare(model, in_flight)
    set_decoders_attention(model, PACKED)
    layers = let_layers_be_computed_again(model, in_flight)
    return BaseModel(model, in_flight, text.vocab_size, text.max_position_embeddings, (), device, dtype, layers=layers)


def _prepare(model: "PreTrainedModel", in_flight: InFlight) -> None:
    model.requires_grad_(False).eval()
    set_attention(model, in_flight)


def _end_tokens(model: "PreTrainedModel") -> tuple[int, ...]:
    generation = getattr(model.generation_config, "eos_token_id", None)
    ends = model.config.get_text_config().eos_token_id if generation is None else generation
    return () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)


def _probe(base: BaseModel) -> None:
    """Runs two tokens and leaves the model PACKED.

    Every layer must attend, and keep nothing else of a sequence; the logits must be the head's own.
    """
    model, name, probe = base.model, type(base.model).__name__, AttentionProbe()
    set_decoders_attention(model, PROBED)
    base.in_flight.cache = probe
    tokens = torch.arange(2, device=base.device)
    with torch.no_grad():
        # An explicit mask keeps transformers from looking for packed sequences in the positions.
        expected = model(tokens[None], attention_mask=torch.ones_like(tokens)[None], use_cache=False).logits[0]
        set_decoders_attention(model, PACKED)
        logits = base.logits(base.hidden_states(tokens, tokens, grad=False))  # [2, vocab]
    base.in_flight.cache = None
    layers = model.config.get_text_config().num_hidden_layers
    if probe.layers.keys() != set(range(layers)):
        raise UnsupportedModelError(f"{len(probe.layers)} of the {layers} layers of {name} call packed attention")
    if not agree(logits, expected, same_operations=True):
        raise UnsupportedModelError(f"{name} changes its logits after the output head, by a softcap or a scale")
