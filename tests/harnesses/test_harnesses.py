"""lm-evaluation-harness and litellm, unchanged, over HTTP: what they are told is what a plain loop over the model gets.
`make harnesses`.

They run in an environment of their own, because they bring much with them; nothing of it needs the network.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import BASE_MODEL, MODEL, ROOT, Server, start_server

BIN = ROOT / "build/harnesses/bin"
QUESTIONS = [
    {"question": f"{word}: n.", "choices": [" A person who", " The act of", " xyzzy"], "answer": i % 3}
    for i, word in enumerate(("hacker", "kluge", "foo", "glitch", "bug", "lorry"))
]
NEW_TOKENS = 12
CHOOSE = """
task: choose
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""
CONTINUE = """
task: continue
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "x"
generation_kwargs: {until: [";"], max_gen_toks: 12, do_sample: false, temperature: 0}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_server(tmp_path_factory.mktemp("server"), "--http", "127.0.0.1:0")
    yield server
    assert server.stop() in (0, 130)


def run(server: Server, folder: Path, *command: str) -> str:
    """What it printed. Fails with its errors where it fails."""
    environment = os.environ | {
        "OPENAI_API_KEY": server.new_key("harness"),
        "HF_HOME": str(folder),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    done = subprocess.run([*command], cwd=folder, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


class PlainLoop:
    """transformers, one prompt after the other."""

    def __init__(self) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=torch.float32)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(BASE_MODEL)

    def score(self, question: str, choice: str) -> float:
        before, whole = self._tokenizer.encode(question), self._tokenizer.encode(question + choice)
        with torch.no_grad():
            logprobs = self._model(torch.tensor([whole])).logits[0].log_softmax(-1)
        return sum(float(logprobs[i - 1, whole[i]]) for i in range(len(before), len(whole)))

    def go_on(self, question: str) -> str:
        tokens = torch.tensor([self._tokenizer.encode(question)])
        mask = torch.ones_like(tokens)
        made = self._model.generate(tokens, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
        text = self._tokenizer.decode(made[0, tokens.shape[1] :], skip_special_tokens=True)
        return text.partition(";")[0]


def test_lm_evaluation_harness_is_told_what_a_plain_loop_gets(server: Server, tmp_path: Path) -> None:
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, task in (("choose", CHOOSE), ("continue", CONTINUE)):
        (tmp_path / f"{name}.yaml").write_text(task % data)
    where = f"model={MODEL},base_url={server.url}/v1/completions,tokenizer={BASE_MODEL},num_concurrent=4,max_retries=1"
    command = [str(BIN / "lm_eval"), "run", "--model", "local-completions", "--model_args", where]
    command += ["--tasks", "choose,continue", "--include_path", str(tmp_path), "--log_samples"]
    run(server, tmp_path, *command, "--output_path", str(tmp_path / "out"))
    loop = PlainLoop()
    samples: dict[str, list[Any]] = {}
    for file in (tmp_path / "out").rglob("samples_*.jsonl"):
        samples[file.name.split("_")[1]] = [json.loads(line) for line in file.read_text().splitlines()]
    assert {name: len(found) for name, found in samples.items()} == {"choose": 6, "continue": 6}
    for sample in samples["choose"]:
        doc = sample["doc"]
        expected = [loop.score(doc["question"], choice) for choice in doc["choices"]]
        assert [float(answer[0][0]) for answer in sample["resps"]] == pytest.approx(expected, abs=1e-3)
        assert sample["acc"] == (max(range(3), key=lambda i: expected[i]) == doc["answer"])
    for sample in samples["continue"]:
        assert sample["resps"][0][0] == loop.go_on(sample["doc"]["question"])


ROUTED = f"""
import json, sys
import litellm
url = sys.argv[1]
turns = [{{"role": "user", "content": "hacker: n."}}]
asked = dict(messages=turns, max_tokens=8, temperature=0)
router = litellm.Router(model_list=[
    {{"model_name": "mine", "litellm_params": {{"model": "openai/{MODEL}", "api_base": url + "/v1"}}}},
])
whole = router.completion(model="mine", **asked).choices[0].message.content
pieces = [chunk.choices[0].delta.content or "" for chunk in router.completion(model="mine", stream=True, **asked)]
print(json.dumps([whole, "".join(pieces)]))
"""


def test_litellm_routes_to_it(server: Server, tmp_path: Path) -> None:
    whole, streamed = json.loads(run(server, tmp_path, str(BIN / "python"), "-c", ROUTED, server.url).splitlines()[-1])
    assert whole == streamed != ""
