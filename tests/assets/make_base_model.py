"""Makes the base model of the demo and the tests: a byte-level BPE tokenizer and a small Qwen3 checkpoint.

The text is the Jargon File 4.4.7 (public domain; "Jargon File 4.4.7", as its editors ask to be cited), cleaned once
into `jargon.txt` beside this script. Everything is written in Hugging Face format, so that the result loads through
the same code as any model of the hub. A fixed seed and a few minutes of CPU:

    python tests/assets/make_base_model.py                          # from jargon.txt
    python tests/assets/make_base_model.py --raw jargon.txt.gz      # from Debian's /usr/share/doc/jargon-text
"""

import argparse
import gzip
import math
import re
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

HERE = Path(__file__).parent
TEXT, MODEL = HERE / "jargon.txt", HERE / "base-model"
END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "´": "'", "\xa0": " ", "—": "-", "•": "*"})


def clean(raw: str) -> str:
    """Entries and stories, one paragraph a line, separated by form feeds; tables and lists of words are left out."""
    documents: list[list[str]] = [[]]
    for block in re.split(r"\n\s*\n", raw.translate(PLAIN)):
        paragraph = " ".join(block.split())
        if entry := re.match(r":(.+?):\s*(.*)", paragraph):
            documents.append([f"{entry[1]}: {entry[2]}".strip()])
        elif paragraph and not re.search("[─│═┼]", paragraph) and re.search(r"[.!?:)\"']$", paragraph):
            documents[-1].append(paragraph)
    return "\n\f\n".join("\n".join(document) for document in documents if len(document) > 1) + "\n"


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = [END, TURN_START, TURN_END]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(documents, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    fast.add_special_tokens({"additional_special_tokens": [TURN_START, TURN_END]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, help="the Jargon File as Debian ships it (jargon.txt.gz)")
    parser.add_argument("--steps", type=int, default=1500)
    options = parser.parse_args()
    if options.raw:
        TEXT.write_text(clean(gzip.decompress(options.raw.read_bytes()).decode()), encoding="utf-8")
    documents = TEXT.read_text(encoding="utf-8").split("\n\f\n")

    torch.manual_seed(0)
    tokenizer = train_tokenizer(documents, vocab_size=2048)
    config = Qwen3Config(
        vocab_size=2048,
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)
    tokens = torch.tensor([t for d in documents for t in [*tokenizer.encode(d), tokenizer.eos_token_id]])
    print(f"{len(tokens):,} tokens, {model.num_parameters():,} parameters")

    rows, length, peak, warmup = 16, 256, 4e-3, 50
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.1)
    started = time.monotonic()
    for step in range(options.steps):
        done = step / options.steps
        rate = peak * min((step + 1) / warmup, 0.05 + 0.475 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(tokens) - length - 1, (rows,))
        batch = torch.stack([tokens[s : s + length] for s in starts])
        loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == options.steps - 1:
            print(f"step {step:5} loss {loss.item():.3f} after {time.monotonic() - started:.0f} s", flush=True)

    model.save_pretrained(MODEL)
    tokenizer.save_pretrained(MODEL)
    prompt = torch.tensor([tokenizer.encode("hacker: n.")])
    print(tokenizer.decode(model.eval().generate(prompt, max_new_tokens=60, do_sample=True, temperature=0.7)[0]))


if __name__ == "__main__":
    main()
