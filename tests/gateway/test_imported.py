"""What was imported is the official SDK's as any other checkpoint is."""

from pathlib import Path

import pytest

from tests.conftest import Server
from tests.service.test_export import logprobs
from tests.service.test_import import PlainLoop, import_
from tests.service.test_training import datum

from .conftest import Tenant


def test_the_sdk_trains_on_and_samples_from_what_was_imported(http_server: Server, tmp_path: Path) -> None:
    tenant = Tenant(http_server, http_server.new_key("importer"))
    loop = PlainLoop()
    loop.steps(4)
    loop.model.save_pretrained(str(tmp_path / "theirs"))
    result = import_(http_server, tmp_path / "theirs", "importer")
    assert result.exit_code == 0, result.output
    data = datum()
    tokens = [*data.model_input.to_ints(), int(data.loss_fn_inputs["target_tokens"].to_torch()[-1])]
    seen = tenant.run("training.from_elsewhere", *result.output.split(), *map(str, tokens))
    expected = logprobs(loop.model).tolist()
    for name in ("sampled", "trained", "with_optimizer"):
        assert seen[name] == pytest.approx(expected, abs=1e-4), name
    loop.steps(1)
    assert seen["after_a_step"] == pytest.approx(logprobs(loop.model).tolist(), abs=1e-4)
    assert seen["listed"] == sorted(result.output.split())
