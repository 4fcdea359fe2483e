"""`lorry export` beside the service that made the checkpoint."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from anyio import to_thread
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

import lorry
from lorry.cli import app
from lorry.storage.looking import looking
from tests.conftest import BASE_MODEL, MODEL, Server

from .test_training import Key, datum


def export(server: Server, *arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, arguments), "--data", str(server.data)])


def logprobs(model: Any) -> torch.Tensor:
    data = datum()
    targets = data.loss_fn_inputs["target_tokens"].to_torch()
    with torch.no_grad():
        logits = model(torch.tensor([data.model_input.to_ints()]), use_cache=False).logits[0]
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
async def test_what_is_exported_has_the_logprobs_of_the_service(server: Server, new_key: Key, tmp_path: Path) -> None:
    async with lorry.connect(server.address, api_key=new_key()) as service:
        training = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
        for _ in range(3):
            training.forward_backward([datum()], "cross_entropy")
            await training.optim_step(lorry.AdamParams(learning_rate=1e-2))
        path = (await training.save_state("leaves")).path
        (output,) = (await training.forward([datum()], "cross_entropy")).loss_fn_outputs
        expected = output["logprobs"].to_torch()

        exported = await to_thread.run_sync(export, server, path, tmp_path / "adapter")
        assert exported.exit_code == 0, exported.output
        assert "It trains the output head" in exported.output
        base = AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=torch.float32)
        adapted = cast(Any, PeftModel.from_pretrained(base, str(tmp_path / "adapter")))
        torch.testing.assert_close(logprobs(adapted), expected, rtol=0, atol=1e-4)

        merge = (path, tmp_path / "merged", "--merge", "--base", BASE_MODEL)
        assert (await to_thread.run_sync(export, server, *merge)).exit_code == 0
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        torch.testing.assert_close(logprobs(merged), expected, rtol=0, atol=1e-4)


async def test_mistakes_are_told_and_leave_nothing_behind(server: Server, new_key: Key, tmp_path: Path) -> None:
    async with lorry.connect(server.address, api_key=new_key()) as service:
        training = await service.create_lora_training_client_async(MODEL, rank=4)
        path = (await training.save_weights_for_sampler("stays")).path
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    new = tmp_path / "new"
    mistakes = [
        ((f"{path}x", new), "expected that of a checkpoint in"),
        ((path, tmp_path / "taken"), "a folder that does not exist, or is empty"),
        ((path, new, "--merge", "--base", tmp_path / "nowhere"), "--base says where it is"),
        ((path, new, "--merge", "--base", tmp_path / "taken"), "config.json cannot be read"),
        ((path, new, "--merge", "--base", BASE_MODEL, "--dtype", "int8"), "float32, bfloat16 or float16"),
        ((path, new, "--dtype", "float32"), "--merge"),
        ((path, tmp_path / "taken" / "file" / "new"), "which could not be written"),
    ]
    for arguments, words in mistakes:
        result = await to_thread.run_sync(export, server, *arguments)
        assert result.exit_code != 0
        assert words in " ".join(result.output.split()), arguments
        assert not new.exists()
    assert (await to_thread.run_sync(export, server, path, new)).exit_code == 0
    with looking(server.data) as store:
        told = [(event.by, event.event) for event in store.audit() if event.subject == path]
    assert told[0][1] == "checkpoint_created"
    assert set(told[1:]) == {("operator", "checkpoint_exported")}, "tried, or done"
