"""vLLM's side of `bench.beside_vllm`, in an environment of its own: `python bench/vllm_side.py MODEL NEW ADAPTER...`.

For every line that it reads, which is a prompt of token ids for each sequence, it samples NEW tokens for each from the
adapters in turn, and prints the seconds. It imports nothing of Lorry's.
"""

import json
import os
import sys
import time

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

from vllm import LLM, SamplingParams, TokensPrompt  # pyright: ignore[reportMissingImports]
from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

if __name__ == "__main__":
    model, new, *folders = sys.argv[1:]
    engine = LLM(
        model=model,
        dtype="float32",
        enforce_eager=True,
        enable_lora=True,
        max_loras=len(folders),
        max_lora_rank=32,
        max_model_len=256,
        skip_tokenizer_init=True,
    )
    adapters = [LoRARequest(f"adapter-{i}", i, folder) for i, folder in enumerate(folders, 1)]
    params = SamplingParams(max_tokens=int(new), temperature=1.0, ignore_eos=True, detokenize=False)
    print("ready", flush=True)
    for line in sys.stdin:
        prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in json.loads(line)]
        chosen = [adapters[i % len(adapters)] for i in range(len(prompts))]
        started = time.perf_counter()
        outputs = engine.generate(prompts, params, lora_request=chosen, use_tqdm=False)
        seconds = time.perf_counter() - started
        assert all(len(output.outputs[0].token_ids) == int(new) for output in outputs)
        print(seconds, flush=True)
    os._exit(0)
