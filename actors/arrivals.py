"""A request on its way into the decode loop: its payload is checked, and its images are seen, before it joins."""

import msgspec

from ..wire.codec import decode
from ..wire.commands import ComputeLogprobsInput, SampleInput, check_sample, check_tokens
from .images.layout import count_images
from .images.looking import Looking, Read
from .model.base_model import BaseModel
from .model.memory import told_as_ours
from .orders import Sample


class Arrival:
    """`request` and `prompt` are there once `read` has said so."""

    def __init__(self, sample: Sample, base: BaseModel) -> None:
        self.sample = sample
        self.request: SampleInput | ComputeLogprobsInput | None = None
        self.prompt: Read | None = None
        self._base = base
        self._looking: Looking | None = None

    def read(self, *, look: bool) -> bool:
        """Whether all has been read. Never waits, and has one image at most go through the tower: none, unless it may
        `look`.

        Raises LorryError for what is wrong with the request, once for all.
        """
        if self.request is None:
            self.request = self._checked()
        tokens = self.request.prompt
        if self._looking is None:
            if tokens.has_images and not look:
                return False
            self._looking = Looking("prompt", tokens, self._base.eyes, keep=False)
        with told_as_ours("what is seen in the prompt's images", "prompt"):
            self.prompt = self._looking.go_on(after_one=False)
        return self.prompt is not None

    @property
    def lacks_pixels(self) -> bool:
        return self._looking is not None and self._looking.lacks_pixels

    def _checked(self) -> SampleInput | ComputeLogprobsInput:
        base, payload = self._base, self.sample.payload
        kind = SampleInput if self.sample.item.kind == "sample" else ComputeLogprobsInput
        request = decode(payload, kind)
        counted = count_images("prompt", request.prompt, base.eyes, base.max_context)
        request = msgspec.structs.replace(request, prompt=counted)
        if isinstance(request, SampleInput):
            check_sample(request, base.vocab_size, base.max_context)
        else:
            check_tokens("prompt", counted, base.vocab_size, base.max_context)
        return request
