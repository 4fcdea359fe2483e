"""Loading a model's tokenizer where the client runs, in a thread, because it takes seconds."""

from typing import TYPE_CHECKING

from anyio import to_thread

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


async def load_tokenizer(tokenizer_id: str) -> "PreTrainedTokenizerBase":
    """`tokenizer_id` is a local folder or a hub id. Raises OSError where it is neither here."""

    def load() -> "PreTrainedTokenizerBase":
        from transformers import AutoTokenizer  # slow to import, and only this needs it

        return AutoTokenizer.from_pretrained(tokenizer_id)

    return await to_thread.run_sync(load)
