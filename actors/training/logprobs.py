"""The output head, log-softmax, loss and their backward in one go, a chunk of tokens at a time, without autograd.

Logits of more than one chunk never exist, and none is computed twice. Knows losses only as a function it is given.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.lora import Layout, LoraLinear, LoraTargets, add_lora, add_lora_backward
from ..model.products import linear_backward, linear_float32

Evaluate = Callable[[int, int, Tensor], tuple[Tensor, Tensor]]
"""(start, end, their logprobs) of some targets -> each one's loss and d loss / d logprob, [end - start] float32."""
Places = tuple[Tensor, Tensor]
"""Of targets in a chunk's logits, row and token, [targets] int64 each."""


@dataclass(frozen=True, slots=True)
class Targets:
    """The tokens whose logprobs are asked for, ordered by the row of `hidden` that predicts them.

    Row i predicts targets `starts[i]` to `starts[i + 1]`: one, several or none.
    """

    tokens: Tensor  # [targets] int64
    rows: Tensor  # [targets] int64
    starts: Sequence[int]  # [tokens + 1], on the host


@dataclass(frozen=True, slots=True)
class Scores:
    """Per target its logprob and loss; `d_hidden` is d loss / d hidden, in the base's dtype."""

    logprobs: Tensor  # [targets] float32
    losses: Tensor  # [targets] float32
    d_hidden: Tensor | None  # [tokens, hidden]


@dataclass(frozen=True, slots=True)
class Chunk:
    start: int
    end: int
    x: Tensor  # [chunk, hidden]
    logits: Tensor  # [chunk, vocab] float32; holds probabilities once normalised
    layout: Layout
    downs: list[Tensor | None]

    def locate(self, targets: Targets) -> tuple[int, int, Places]:
        """Which targets are this chunk's, and their places in `logits`."""
        first, last = targets.starts[self.start], targets.starts[self.end]
        return first, last, (targets.rows[first:last] - self.start, targets.tokens[first:last])


LEAST_CHUNK = 16
"""Rows of a product with the head while others wait: fewer take as long, since all of its weights are read."""


class OutputHead:
    """`chunk_bytes` bounds the float32 logits that exist at one time. While others wait for the device, a product with
    the head is to take about as long as the longest of the layers before it."""

    def __init__(self, head: LoraLinear, targets: LoraTargets, chunk_bytes: int = 64 << 20) -> None:
        outputs = {t.index: t.most_outputs for t in targets.modules}
        self.head = head
        self.chunk_tokens = max(1, chunk_bytes // (4 * outputs[head.index]))
        body = max(t.inputs * t.most_outputs for t in targets.modules if t.index != head.index)
        self._body_over_head = body / (head.in_features * outputs[head.index])

    @torch.no_grad()
    def logprobs(self, hidden: Tensor, targets: Targets) -> Tensor:
        """hidden [tokens, hidden]: the packed row whose segments are in flight -> [targets] float32."""
        found = torch.empty(len(targets.tokens), device=hidden.device)
        for chunk in self._chunks(hidden):
            first, last, places = chunk.locate(targets)
            found[first:last] = self._normalise_(chunk.logits, places)
            del chunk  # before the next one's logits are made
        return found

    @torch.no_grad()
    def score(self, hidden: Tensor, targets: Targets, evaluate: Evaluate, *, backward: bool) -> Scores:
        """The targets' logprobs and losses.

        With `backward` also d loss / d hidden, while the gradients of the head's own adapters are added in place.
        """
        logprobs = torch.empty(len(targets.tokens), device=hidden.device)  # [targets]
        losses = torch.empty_like(logprobs)
        d_hidden = torch.empty_like(hidden) if backward else None
        for chunk in self._chunks(hidden):
            first, last, places = chunk.locate(targets)
            logprobs[first:last] = found = self._normalise_(chunk.logits, places)
            losses[first:last], grads = evaluate(first, last, found)
            if d_hidden is not None:
                self.head.in_flight.pause()
                self._backward(chunk, places, grads, d_hidden[chunk.start : chunk.end])
            del chunk
        return Scores(logprobs, losses, d_hidden)

    def _chunks(self, hidden: Tensor) -> Iterator[Chunk]:
        """Of nearly equal size, while nobody begins or ends to wait for the device."""
        tokens, start = len(hidden), 0
        layout = self.head.layout(tokens)
        while start < tokens:
            self.head.in_flight.pause()
            most = self.chunk_tokens
            if self.head.in_flight.beside_others:
                most = min(most, max(LEAST_CHUNK, int(tokens * self._body_over_head)))
            count = -(-(tokens - start) // most)
            end = start + -(-(tokens - start) // count)
            yield self._chunk(hidden[start:end], start, end, layout.clip(start, end))
            start = end

    def _chunk(self, x: Tensor, start: int, end: int, layout: Layout) -> Chunk:
        logits = linear_float32(x, self.head.weight, self.head.bias)  # [chunk, vocab]
        downs = add_lora(layout, x, logits)
        return Chunk(start, end, x, logits, layout, downs)

    def _backward(self, chunk: Chunk, places: Places, grads: Tensor, d_x: Tensor) -> None:
        """Turns probabilities into d loss / d logits in place, and these into `d_x` [chunk, hidden]."""
        d_logits = chunk.logits
        totals = torch.zeros(len(d_logits), device=grads.device).index_add_(0, places[0], grads)  # [chunk]
        self._add_at_(d_logits.mul_(-totals.unsqueeze(1)), places, grads)
        d_logits = d_logits.to(d_x.dtype)
        d_x.copy_(linear_backward(d_logits, self.head.weight))
        add_lora_backward(chunk.layout, chunk.x, chunk.downs, d_logits, d_x)

    def _normalise_(self, logits: Tensor, places: Places) -> Tensor:
        """Turns logits [chunk, vocab] into probabilities in place; returns the logprobs at `places`, [targets]."""
        found = logits[places]
        found -= _normalise_(logits)[places[0]]
        return found

    def _add_at_(self, d_logits: Tensor, places: Places, grads: Tensor) -> None:
        d_logits.index_put_(places, grads, accumulate=True)


def _normalise_(logits: Tensor) -> Tensor:
    """Turns logits [chunk, vocab] into probabilities in place; returns the logarithm of each row's normaliser [chunk].

    log(sum(exp(x))) = max(x) - log(greatest probability): nothing of the vocabulary's size is allocated.
    """
    peaks = logits.amax(-1)  # [chunk]
    torch.softmax(logits, -1, out=logits)
    return peaks - logits.amax(-1).log_()
