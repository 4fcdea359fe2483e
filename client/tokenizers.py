"""Loading a model's tokenizer where the client runs, in a thread, because it takes seconds."""

from threading import Lock
from typing import TYPE_CHECKING

from anyio import to_thread

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_one_at_a_time = Lock()
"""transformers imports its parts as they are first asked for, and not all of it when two threads are."""


async def load_tokenizer(tokenizer_id: str) -> "PreTrainedTokenizerBase":
    """`tokenizer_id`, a local folder or a hub id, is a server's word: code that lies there is not run.

    Raises OSError where it is neither here, ValueError where it cannot be loaded without its own code.
    """

    def load() -> "PreTrainedTokenizerBase":
        with _one_at_a_time:
            from transformers import AutoTokenizer  # slow to import, and only this needs it

            # Said and not left out: without an answer, transformers may ask for one on standard input.
            return AutoTokenizer.from_pretrained(tokenizer_id, trust_remote_code=False)

    return await to_thread.run_sync(load)
