"""`lorry import`: an adapter that PEFT trained is sampled, trained on and exported, and is the same at each stop."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from anyio import to_thread
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

import lorry
from lorry.cli import app
from lorry.wire.errors import InvalidRequestError
from tests.conftest import BASE_MODEL, MODEL, Server

from .test_export import export, logprobs
from .test_training import datum

ADAM = lorry.AdamParams(learning_rate=3e-3)


def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=torch.float32)


class PlainLoop:
    """As users of PEFT write it; steps as Lorry's do."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        self.model = cast(Any, get_peft_model(base(), config))
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._trained = trained

    def steps(self, count: int) -> None:
        """With moments of their own, as a run that is loaded without any begins with."""
        adam = torch.optim.AdamW(self._trained, ADAM.learning_rate, (ADAM.beta1, ADAM.beta2), ADAM.eps, 0.0)
        data = datum()
        targets = data.loss_fn_inputs["target_tokens"].to_torch()
        for _ in range(count):
            adam.zero_grad()
            logits = self.model(torch.tensor([data.model_input.to_ints()]), use_cache=False).logits[0]
            torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
            adam.step()


def import_(server: Server, folder: Path, tenant: str, *options: str) -> Result:
    arguments = ["import", str(folder), "--tenant", tenant, "--connect", server.address, "--data", str(server.data)]
    return CliRunner().invoke(app, [*arguments, *(options or ("--model", MODEL, "--base", str(BASE_MODEL)))])


async def ours(training: lorry.TrainingClient) -> torch.Tensor:
    (output,) = (await training.forward([datum()], "cross_entropy")).loss_fn_outputs
    return output["logprobs"].to_torch()


async def sampled_from(service: lorry.ServiceClient, path: str) -> torch.Tensor:
    data = datum()
    tokens = [*data.model_input.to_ints(), int(data.loss_fn_inputs["target_tokens"].to_torch()[-1])]
    sampler = await service.create_sampling_client_async(path)
    return torch.tensor((await sampler.compute_logprobs_async(lorry.ModelInput.from_ints(tokens)))[1:])


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


async def test_a_plain_loops_adapter_is_the_same_at_each_stop(server: Server, tmp_path: Path) -> None:
    loop = PlainLoop()
    loop.steps(5)
    loop.model.save_pretrained(str(tmp_path / "theirs"))
    async with lorry.connect(server.address, api_key=server.new_key("importer")) as service:
        result = await to_thread.run_sync(import_, server, tmp_path / "theirs", "importer")
        assert result.exit_code == 0, result.output
        to_train, to_sample = result.output.split()
        assert_same(await sampled_from(service, to_sample), logprobs(loop.model))

        training = await service.create_lora_training_client_async(MODEL, rank=4, train_mlp=False, train_unembed=False)
        training.load_state(to_train)
        assert_same(await ours(training), logprobs(loop.model))
        for _ in range(3):
            training.forward_backward([datum()], "cross_entropy")
            await training.optim_step(ADAM)
        loop.steps(3)
        assert_same(await ours(training), logprobs(loop.model))
        path = (await training.save_state("further")).path

        with pytest.raises(InvalidRequestError, match=r"a checkpoint with alpha 32.0, its own is 16.0"):
            other = await service.create_lora_training_client_async(MODEL, rank=4, train_mlp=False, train_unembed=False)
            other.forward_backward([datum()], "cross_entropy")
            await other.load_state(path)
    assert (await to_thread.run_sync(export, server, path, tmp_path / "ours")).exit_code == 0
    again = cast(Any, PeftModel.from_pretrained(base(), str(tmp_path / "ours")))
    assert_same(logprobs(again), logprobs(loop.model))
    assert {"q_proj", "v_proj"} == set(again.peft_config["default"].target_modules)


async def test_mistakes_are_told_and_leave_nothing_behind(server: Server, tmp_path: Path) -> None:
    PlainLoop().model.save_pretrained(str(tmp_path / "theirs"))
    named, based = ("--model", MODEL), ("--base", str(BASE_MODEL))
    nobody = Server(server.process, "tcp://127.0.0.1:9", server.data, "")
    server.new_key("mistaken")
    before = sorted((server.data / "checkpoints").glob("*/imported/*"))
    mistakes = [
        (server, "theirs", "nobody", (*named, *based), "there is no tenant 'nobody'"),
        (server, "theirs", "mistaken", based, "served are: jargon-1m"),
        (server, "theirs", "mistaken", (*named, *based, "--name", "../up"), "name is '../up'"),
        (server, "theirs", "mistaken", (*named, "--base", "nowhere/at-all"), "--base says where it is"),
        (server, "theirs", "mistaken", (*named, "--base", str(tmp_path)), "config.json"),
        (server, "elsewhere", "mistaken", (*named, *based), "adapter_config.json cannot be read"),
        (nobody, "theirs", "mistaken", (*named, *based), "Check that `lorry serve` runs"),
    ]
    for there, folder, tenant, options, words in mistakes:
        result = await to_thread.run_sync(import_, there, tmp_path / folder, tenant, *options)
        assert result.exit_code != 0
        assert words in " ".join(result.output.split()), (options, result.output)
        assert sorted((server.data / "checkpoints").glob("*/imported/*")) == before
    result = await to_thread.run_sync(
        import_, server, tmp_path / "theirs", "mistaken", *named, *based, "--name", "as-is"
    )
    assert [line.rpartition("/")[2] for line in result.output.split()] == ["as-is", "as-is"]
