"""Any server of OpenAI's completions, by URL, through the official client. It samples, and trains nothing."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager

from openai import AsyncOpenAI

from lorry.wire.errors import InvalidRequestError

from .drive import Marks, Seat
from .keys import key_of
from .requests import Batch, Prompt
from .workload import Sample, Tenant


class OpenAIServer:
    """Prompts are sent as token ids, answers streamed: `token_s` are the chunks of each request's first sequence."""

    def __init__(self, url: str, model: str, keys: Mapping[str, str]) -> None:
        self._url, self._model, self._keys = url, model, keys

    @asynccontextmanager
    async def seat(self, tenant: Tenant, name: str) -> AsyncGenerator[Seat]:
        """Raises InvalidRequestError for a tenant who wants anything else of it."""
        if not all(isinstance(work, Sample) and work.base for work in tenant.work):
            where = f"tenants[{tenant.name!r}].work"
            raise InvalidRequestError(f"{where} has more than samples with base = true, all that is here", field=where)
        key = key_of(self._keys, name)
        async with AsyncOpenAI(base_url=self._url, api_key=key, max_retries=0) as client:
            yield _OpenAISeat(client, self._model)


class _OpenAISeat:
    def __init__(self, client: AsyncOpenAI, model: str) -> None:
        self._client, self._model = client, model

    async def train(self, batch: Batch, marks: Marks) -> None:
        raise NotImplementedError("nobody who trains gets a seat")

    async def sample(self, prompt: Prompt, marks: Marks) -> int:
        chunks = await self._client.completions.create(
            model=self._model,
            prompt=prompt.tokens,
            max_tokens=prompt.max_tokens,
            n=prompt.samples,
            seed=prompt.seed,
            stream=True,
            stream_options={"include_usage": True},
        )
        came, counted = 0, None
        async for chunk in chunks:
            for choice in chunk.choices:
                if not choice.text:
                    continue
                came += 1
                if choice.index == 0:
                    marks.token()
            if chunk.usage is not None:
                counted = chunk.usage.completion_tokens
        return came if counted is None else counted
