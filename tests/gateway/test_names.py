"""What was accepted keeps its weights, whatever becomes of the names that led to them."""

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import Server, children_of, start_server

from .conftest import Tenant
from .refusals import ADAM, Run

CHANGES = ("overwrite", "delete", "expire", "unpublish")


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    """A server that a test may harm."""
    server = start_server(tmp_path / "data", "--http", "127.0.0.1:0")
    yield server
    server.stop()


def answer(http: httpx.Client, endpoint: str, **body: Any) -> dict[str, Any]:
    """The result of a request that is accepted; waits as long as it takes."""
    accepted = http.post(endpoint, **body)
    assert accepted.status_code == 200, accepted.text
    while True:
        result = http.post("retrieve_future", json={"request_id": accepted.json()["request_id"]}).json()
        if result.get("type") != "try_again":
            return result


def learn(run: Run) -> None:
    answer(run.http, "forward_backward", content=run.a_pass().SerializeToString())
    answer(run.http, "optim_step", json={"model_id": run.id, "seq_id": run.next(), "optim_params": ADAM})


def loss_of(run: Run) -> float:
    message = run.a_pass()
    message.forward_only = True
    return answer(run.http, "forward_backward", content=message.SerializeToString())["metrics"]["loss:sum"]


def load(run: Run, path: str) -> dict[str, Any]:
    body = {"model_id": run.id, "seq_id": run.next(), "path": path, "optimizer": True}
    return answer(run.http, "load_weights", json=body)


@dataclass(slots=True)
class Sampler:
    http: httpx.Client
    id: str
    seq: int = 0

    @classmethod
    def of(cls, run: Run, path: str, number: int) -> "Sampler":
        body = {"session_id": run.id.partition(":")[0], "sampling_session_seq_id": number, "model_path": path}
        made = run.http.post("create_sampling_session", json=body)
        assert made.status_code == 200, made.text
        return cls(run.http, made.json()["sampling_session_id"])

    def logprobs(self) -> list[float | None]:
        self.seq += 1
        body = {
            "sampling_session_id": self.id,
            "seq_id": self.seq,
            "num_samples": 1,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3, 4]}]},
            "sampling_params": {"max_tokens": 1, "stop": []},
            "prompt_logprobs": True,
        }
        return answer(self.http, "asample", json=body)["prompt_logprobs"]


def change(author: Run, change: str, path: str, name: str, endpoint: str) -> None:
    """What becomes of a name; when this returns, it has."""
    at = f"training_runs/{author.id}/checkpoints/{path.removeprefix(f'tinker://{author.id}/')}"
    match change:
        case "overwrite":
            extra = {"overwrite": True} if endpoint == "save_weights" else {}
            body = {"model_id": author.id, "seq_id": author.next(), "path": name}
            assert answer(author.http, endpoint, json=body | extra)["path"] == path
        case "delete":
            assert author.http.delete(at).status_code == 204
        case "expire":
            assert author.http.put(f"{at}/ttl", json={"ttl_seconds": 1}).status_code == 204
            while path in author.http.get("checkpoints").text:
                pass
        case _:
            assert author.http.delete(f"{at}/publish").status_code == 204


def test_an_actor_that_dies_after_names_have_changed_costs_nobody_their_weights(own_server: Server) -> None:
    owner, other = (Tenant(own_server, own_server.new_key(name)) for name in ("owner", "other"))
    with owner.http() as own, other.http() as others:
        author = Run(owner, own)
        learn(author)
        states = {c: author.saved("save_weights", c) for c in CHANGES}
        weights = {c: author.saved("save_weights_for_sampler", c) for c in CHANGES}
        for path in (*states.values(), *weights.values()):
            place = path.removeprefix("tinker://").replace(author.id, f"training_runs/{author.id}/checkpoints", 1)
            assert own.post(f"{place}/publish").status_code == 204
        runs = {(c, t.key): Run(t, http) for c in CHANGES for t, http in ((owner, own), (other, others))}
        samplers = {
            (c, t): Sampler.of(run, weights[c], number) for number, ((c, t), run) in enumerate(runs.items(), start=1)
        }
        for (c, _), run in runs.items():
            assert "error" not in load(run, states[c])
            learn(run)
        before = {key: (loss_of(run), samplers[key].logprobs()) for key, run in runs.items()}

        for _ in range(3):
            learn(author)
        for c in CHANGES:
            change(author, c, states[c], c, "save_weights")
            change(author, c, weights[c], c, "save_weights_for_sampler")
        os.kill(children_of(own_server.process.pid)["actor"], signal.SIGKILL)

        for key, run in runs.items():
            losses, logprobs = before[key]
            assert loss_of(run) == pytest.approx(losses, rel=1e-6), key[0]
            assert samplers[key].logprobs() == [None, *(pytest.approx(x, rel=1e-6) for x in logprobs[1:])], key[0]
            learn(run)

        newcomer = Run(other, others)
        assert {c: "error" in load(newcomer, states[c]) for c in CHANGES} == dict.fromkeys(CHANGES, True) | {
            "overwrite": True  # what was saved again is not public
        }
        assert {c: "error" in load(author, states[c]) for c in CHANGES} == {
            "overwrite": False,
            "delete": True,
            "expire": True,
            "unpublish": False,
        }
        assert Sampler.of(author, weights["overwrite"], 99).logprobs() != before["overwrite", owner.key][1]


def test_folders_go_when_nothing_needs_them_any_more(tenant: Tenant) -> None:
    with tenant.http() as http:
        author, reader = Run(tenant, http), Run(tenant, http)
        paths = [author.saved("save_weights", name) for name in ("kept", "dropped", "former", "newest")]
        folder = tenant.server.data / "checkpoints" / author.id / "weights"
        load(reader, paths[0])
        for path in paths:
            place = path.removeprefix(f"tinker://{author.id}/")
            assert http.delete(f"training_runs/{author.id}/checkpoints/{place}").status_code == 204
        kept = {file.name.partition(".")[0] for file in folder.iterdir()}
        assert kept == {"kept", "former", "newest"}, (
            "one run came from the first, the author is rebuilt from the last two"
        )


def test_a_load_finds_a_save_of_its_own_run_that_is_on_its_way(tenant: Tenant) -> None:
    with tenant.http() as http:
        run = Run(tenant, http)
        learn(run)
        before = loss_of(run)
        save = {"model_id": run.id, "seq_id": run.next() + 1, "path": "soon"}
        path = f"tinker://{run.id}/weights/soon"
        blocked = run.a_pass()  # the seq before the save: what comes behind waits for it
        blocked.seq_id = run.seq - 1
        blocked.forward_only = True
        http.post("save_weights", json=save)
        body = {"model_id": run.id, "seq_id": run.next(), "path": path, "optimizer": True}
        request = http.post("load_weights", json=body).json()["request_id"]
        http.post("forward_backward", content=blocked.SerializeToString())
        assert http.post("retrieve_future", json={"request_id": request}).json() == {
            "path": path,
            "type": "load_weights",
        }
        assert loss_of(run) == pytest.approx(before, rel=1e-6)


def test_a_name_that_is_about_to_be_taken_is_taken(tenant: Tenant) -> None:
    with tenant.http() as http:
        run = Run(tenant, http)
        first = run.next()
        http.post("save_weights", json={"model_id": run.id, "seq_id": run.next(), "path": "twice"})
        assert "overwrite=True" in run.post("save_weights", path="twice")
        message = run.a_pass()
        message.seq_id, run.seq = first, run.seq - 1
        http.post("forward_backward", content=message.SerializeToString())
        assert run.goes_on()


def test_a_copy_outlives_what_it_was_copied_from(tenant: Tenant) -> None:
    with tenant.http() as http:
        author = Run(tenant, http)
        learn(author)
        expected = loss_of(author)
        path = author.saved("save_weights", "original")
        copied = http.post("copy_weights", json={"source_path": path}).json()["tinker_path"]
        place = path.removeprefix(f"tinker://{author.id}/")
        assert http.delete(f"training_runs/{author.id}/checkpoints/{place}").status_code == 204
        author.saved("save_weights", "newer")
        reader = Run(tenant, http)
        load(reader, copied)
        assert loss_of(reader) == pytest.approx(expected, rel=1e-6)


def test_what_has_expired_is_gone_at_that_second(tenant: Tenant) -> None:
    """Long before anybody sweeps: it is not listed, loaded or sampled, and its name is free."""
    with tenant.http() as http:
        run = Run(tenant, http)
        weights = run.saved("save_weights_for_sampler", "brief")
        state = run.saved("save_weights", "brief")
        change(run, "expire", state, "brief", "save_weights")
        change(run, "expire", weights, "brief", "save_weights_for_sampler")
        assert "there is no checkpoint" in run.post("load_weights", path=state, optimizer=False)
        session = {"session_id": run.id.partition(":")[0], "sampling_session_seq_id": 7}
        assert http.post("create_sampling_session", json=session | {"model_path": weights}).status_code == 404
        assert run.saved("save_weights", "brief") == state
