"""vLLM's logprobs of prompts, in an environment of its own: `python tests/vllm/program.py MODEL TOKENS [ADAPTER]`.

TOKENS are numbers with commas between them. Prints the logprob of each but the first as a line of JSON. It imports
nothing of Lorry's.
"""

import json
import os
import sys

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

from vllm import LLM, SamplingParams, TokensPrompt
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    model, told, *adapter = sys.argv[1:]
    tokens = [int(token) for token in told.split(",")]
    engine = LLM(
        model=model,
        dtype="float32",
        enforce_eager=True,
        enable_lora=bool(adapter),
        max_lora_rank=16,
        max_model_len=64,
        skip_tokenizer_init=True,
    )
    (output,) = engine.generate(
        TokensPrompt(prompt_token_ids=tokens),
        SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1, detokenize=False),
        lora_request=LoRARequest("adapter", 1, adapter[0]) if adapter else None,
        use_tqdm=False,
    )
    assert output.prompt_logprobs is not None
    found = [entry[token].logprob for token, entry in zip(tokens, output.prompt_logprobs, strict=True) if entry]
    print(json.dumps(found), flush=True)
    os._exit(0)
