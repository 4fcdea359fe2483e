"""A run over plain HTTP and over the bare wire, and every mistake that one of its commands can be refused for."""

import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import msgpack
import numpy as np
import zstandard
from tinker.proto import tinker_public_pb2 as public_pb

from lorry.wire.codec import MAX_PAYLOAD_BYTES, encode
from tests.conftest import MODEL
from tests.service.raw import Raw

from .conftest import Tenant

INPUT = b"\1\0\0\0\2\0\0\0"
ADAM = {"learning_rate": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12, "weight_decay": 0, "grad_clip_norm": 0}


def tensor(values: list[float] | None = None, **fields: Any) -> public_pb.Tensor:
    """Two numbers of float32, or whatever else."""
    dense = np.asarray([1.0, 1.0] if values is None else values, dtype="<f4").tobytes()
    return public_pb.Tensor(**({"dtype": public_pb.DTYPE_FLOAT32, "shape": [2], "dense": dense} | fields))


@dataclass(slots=True)
class Run:
    """A new run, driven by whoever makes mistakes in it. `seq` is that of its next command."""

    tenant: Tenant
    http: httpx.Client
    id: str = ""
    seq: int = 0

    def __post_init__(self) -> None:
        session = self.http.post("create_session", json={"tags": [], "user_metadata": None, "sdk_version": "0"}).json()
        body = {"session_id": session["session_id"], "model_seq_id": 0, "base_model": MODEL, "lora_config": {"rank": 4}}
        self.id = self.http.post("create_model", json=body).json()["model_id"]

    def next(self) -> int:
        self.seq += 1
        return self.seq

    # Over HTTP -------------------------------------------------------------------------------------------------------

    def a_pass(
        self, loss: str = "cross_entropy", **inputs: public_pb.Tensor | None
    ) -> public_pb.ForwardBackwardRequest:
        """One datum of two tokens; an input that is None is left out."""
        message = public_pb.ForwardBackwardRequest(model_id=self.id, seq_id=self.next(), loss_fn=loss)
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = INPUT
        targets = public_pb.Tensor(dtype=public_pb.DTYPE_INT32, shape=[2], dense=b"\2\0\0\0\3\0\0\0")
        for name, value in ({"target_tokens": targets} | inputs).items():
            if value is not None:
                datum.loss_fn_inputs[name].CopyFrom(value)
        return message

    def backward(self, message: public_pb.ForwardBackwardRequest) -> str:
        return self.failure("forward_backward", content=message.SerializeToString())

    def post(self, endpoint: str, **body: Any) -> str:
        return self.failure(endpoint, json={"model_id": self.id, "seq_id": self.next()} | body)

    def failure(self, path: str, **request: Any) -> str:
        """How the future of a request failed that was accepted all the same."""
        answer = self.http.post(path, **request)
        assert answer.status_code == 200, answer.text
        result = self.http.post("retrieve_future", json={"request_id": answer.json()["request_id"]}).json()
        assert "error" in result, result
        return result["error"]

    def saved(self, path: str, name: str) -> str:
        """A checkpoint's path."""
        request = self.http.post(path, json={"model_id": self.id, "seq_id": self.next(), "path": name})
        return self.http.post("retrieve_future", json={"request_id": request.json()["request_id"]}).json()["path"]

    def goes_on(self) -> bool:
        """A pass and a step are answered with results."""
        ends = []
        for path, body in (
            ("forward_backward", {"content": self.a_pass().SerializeToString()}),
            ("optim_step", {"json": {"model_id": self.id, "seq_id": self.next(), "optim_params": ADAM}}),
        ):
            request = self.http.post(path, **body).json()["request_id"]
            ends.append(self.http.post("retrieve_future", json={"request_id": request}).json())
        return all("metrics" in end for end in ends)

    # On the bare wire ------------------------------------------------------------------------------------------------

    def submit(self, kind: str, payload: bytes = b"", **header: object) -> str:
        with Raw.connected(self.tenant.server.address) as raw:
            raw.hello(self.tenant.key)
            seq = self.next()
            raw.send({"type": "submit", "request": 1, "lane": self.id, "seq": seq, "kind": kind} | header, payload)
            for _ in range(2):
                found = raw.receive_header()
                if found["type"] == "resolved":
                    return found["error"]["message"]
        raise AssertionError(found)


def chunk(run: Run, count: int) -> public_pb.ForwardBackwardRequest:
    """A pass over a prompt of `count` tokens."""
    message = run.a_pass()
    datum = message.data[0]
    datum.model_input[0].encoded_text.tokens = b"\5\0\0\0" * count
    targets = public_pb.Tensor(dtype=public_pb.DTYPE_INT32, shape=[count], dense=b"\5\0\0\0" * count)
    datum.loss_fn_inputs["target_tokens"].CopyFrom(targets)
    return message


def changed(message: public_pb.ForwardBackwardRequest, change: Callable[[Any], object]) -> Any:
    change(message)
    return message


def cut_short(run: Run) -> str:
    """A body whose compressed frame ends in its middle, long enough that its beginning could be read."""
    message = run.a_pass(noise=public_pb.Tensor(dtype=public_pb.DTYPE_FLOAT32, dense=secrets.token_bytes(2**20)))
    body = zstandard.ZstdCompressor().compress(message.SerializeToString())[:-1000]
    return run.failure("forward_backward", content=body, headers={"Content-Encoding": "zstd"})


def too_large(run: Run) -> str:
    message = run.a_pass(noise=public_pb.Tensor(dtype=public_pb.DTYPE_FLOAT32, dense=bytes(65 << 20)))
    return run.failure("forward_backward", content=message.SerializeToString())


def taken(run: Run) -> str:
    run.saved("save_weights", "once")
    return run.post("save_weights", path="once")


def another_sampler_there(run: Run) -> str:
    run.http.post(
        "save_weights_for_sampler", json={"model_id": run.id, "seq_id": run.next(), "sampling_session_seq_id": 0}
    )
    assert run.goes_on()
    return run.post("save_weights_for_sampler", sampling_session_seq_id=0)


def other_rank(run: Run) -> str:
    other = Run(run.tenant, run.http)
    session = other.id.partition(":")[0]
    body = {"session_id": session, "model_seq_id": 1, "base_model": MODEL, "lora_config": {"rank": 8}}
    other.id = run.http.post("create_model", json=body).json()["model_id"]
    return run.post("load_weights", path=other.saved("save_weights", "of-rank-8"), optimizer=False)


def broken_files(run: Run, harm: Callable[[Any], object]) -> str:
    path = run.saved("save_weights", "state")
    (folder,) = (run.tenant.server.data / "checkpoints" / run.id / "weights").glob("state.*")
    harm(folder / "adapter_model.safetensors")
    return run.post("load_weights", path=path, optimizer=False)


def no_room_for_files(run: Run) -> str:
    place = run.tenant.server.data / "checkpoints" / run.id
    place.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(place)
    place.write_text("a file where a folder is to be")
    said = run.post("save_weights", path="x")
    place.unlink()
    return said


def a_step_too_large(run: Run) -> str:
    run.http.post("forward_backward", content=run.a_pass().SerializeToString())
    return run.post("optim_step", optim_params=ADAM | {"learning_rate": 1e300})


@dataclass(frozen=True, slots=True)
class Mistake:
    """`where` is the function that refuses it, `says` a part of what it says."""

    where: str
    says: str
    make: Callable[[Run], str]


def _pass(where: str, says: str, loss: str = "cross_entropy", **inputs: public_pb.Tensor | None) -> Mistake:
    return Mistake(where, says, lambda run: run.backward(run.a_pass(loss, **inputs)))


def _with(where: str, says: str, change: Callable[[Any], object], loss: str = "cross_entropy") -> Mistake:
    return Mistake(where, says, lambda run: run.backward(changed(run.a_pass(loss), change)))


def _post(where: str, says: str, endpoint: str, **body: Any) -> Mistake:
    return Mistake(where, says, lambda run: run.post(endpoint, **body))


COMMANDS, PROTOBUF = "wire/commands.py::", "gateway/tinker/protobuf.py::"
WEIGHTS, ADMISSION = "gateway/tinker/weights.py::", "scheduler/admission.py::"
SPARSE = public_pb.SparseCsr(values=b"", crow_indices=bytes(8), col_indices=b"")
POLICY = {"logprobs": tensor(), "advantages": tensor()}

MISTAKES = [
    # What a pass is checked for
    _pass(COMMANDS + "_spec", "loss_fn is 'focal'", "focal"),
    _pass(PROTOBUF + "_custom", "loss_fn_config is []", "custom"),
    _with(
        "gateway/tinker/custom_losses.py::loss_of",
        "expected what create_custom_loss answered",
        lambda m: (
            m.loss_fn_config_v2["loss_id"].MergeFrom(type(m.loss_fn_config_v2["loss_id"])(text="loss-x")),
            setattr(m, "loss_fn", "custom"),
        ),
    ),
    _with(
        COMMANDS + "check_forward_backward",
        "loss_fn_config is 'margin'",
        lambda m: m.loss_fn_config.update({"margin": 1.0}),
    ),
    Mistake(
        COMMANDS + "check_forward_backward",
        "loss_fn_config['beta'] is nan",
        lambda run: run.backward(
            changed(run.a_pass("dro", **POLICY), lambda m: m.loss_fn_config.update({"beta": float("nan")}))
        ),
    ),
    _with(COMMANDS + "check_forward_backward", "data is []", lambda m: m.ClearField("data")),
    _pass(COMMANDS + "_check_datum", "target_tokens as well", target_tokens=None),
    _pass(COMMANDS + "_check_datum", "only target_tokens, weights", rewards=tensor()),
    _pass(COMMANDS + "_check_datum", "['target_tokens'].shape is", target_tokens=tensor([1.0], shape=[1])),
    _pass(COMMANDS + "_check_datum", "['target_tokens'].dtype is", target_tokens=tensor()),
    _pass(COMMANDS + "_check_datum", "['weights'].shape is", weights=tensor([1.0], shape=[1])),
    _pass(COMMANDS + "_check_datum", "['weights'] is nan", weights=tensor([float("nan"), 1.0])),
    _pass(
        COMMANDS + "_check_datum", "['sequence_ratio_mask'] is 0", "gspo", sequence_ratio_mask=tensor([0, 0]), **POLICY
    ),
    _with(COMMANDS + "check_tokens", "at least one token", lambda m: m.data[0].ClearField("model_input")),
    Mistake(COMMANDS + "check_tokens", "the model's context", lambda run: run.backward(chunk(run, 4097))),
    Mistake(
        COMMANDS + "check_tokens",
        "integers below 2**63",
        lambda run: run.submit(
            "forward",
            msgpack.packb(
                {
                    "data": [{"model_input": {"chunks": [{"tokens": [2**63]}]}, "loss_fn_inputs": _target()}],
                    "loss_fn": "cross_entropy",
                }
            ),
        ),
    ),
    _pass(
        COMMANDS + "_check_range",
        "is -100, expected token ids",
        target_tokens=public_pb.Tensor(dtype=public_pb.DTYPE_INT32, shape=[2], dense=b"\x9c\xff\xff\xff\3\0\0\0"),
    ),
    _post(
        COMMANDS + "check_adam_params", "learning_rate is -1", "optim_step", optim_params=ADAM | {"learning_rate": -1}
    ),
    _post(COMMANDS + "check_adam_params", "beta1 is 1.5", "optim_step", optim_params=ADAM | {"beta1": 1.5}),
    # What a body is read for
    Mistake("gateway/bodies.py::read", "which is the limit", too_large),
    Mistake("gateway/bodies.py::_unpacked", "in the middle of its zstd frame", cut_short),
    _post("gateway/bodies.py::parse", "learning_rate", "optim_step", optim_params=ADAM | {"learning_rate": None}),
    Mistake(
        PROTOBUF + "read_pass",
        "no ForwardBackwardRequest",
        lambda run: run.failure("forward_backward", content=run.a_pass().SerializeToString() + b"\xff\xff"),
    ),
    _with(
        PROTOBUF + "_config",
        "expected a number",
        lambda m: m.loss_fn_config_v2["beta"].MergeFrom(type(m.loss_fn_config_v2["beta"])(text="much")),
    ),
    _with(PROTOBUF + "_model_input", "chunks[0] is dmel", lambda m: _become(m, dmel={"dmel": b"x"})),
    _with(
        PROTOBUF + "_image",
        "override_dimensions",
        lambda m: _become(m, image={"data": b"x", "format": "png", "override_dimensions": {"width": 1, "height": 1}}),
    ),
    _with(
        COMMANDS + "_check_image",
        "chunks[0].format is 'gif'",
        lambda m: _become(m, image={"data": b"x", "format": "gif"}),
    ),
    _with(
        COMMANDS + "_check_image",
        "chunks[0].expected_tokens is 0",
        lambda m: _become(m, image={"data": b"x", "format": "png", "expected_tokens": 0}),
    ),
    _with(
        "actors/images/eyes.py::the_eyes",
        "served without eyes",
        lambda m: _become(m, image={"data": b"x", "format": "png"}),
    ),
    _pass(PROTOBUF + "_tensor", "which no tensor has", weights=public_pb.Tensor(shape=[2], dense=bytes(8))),
    _pass(PROTOBUF + "_array", "no whole number of", weights=tensor(dense=bytes(7))),
    _pass(
        "gateway/tinker/tensors.py::check_shape",
        "elements",
        weights=public_pb.Tensor(dtype=public_pb.DTYPE_INT64, sparse_csr=SPARSE, shape=[2**31, 2**31]),
    ),
    _pass("gateway/tinker/tensors.py::fill", "do not fill shape", weights=tensor(shape=[3])),
    _pass(
        "gateway/tinker/tensors.py::unfold",
        "row and column indices",
        weights=public_pb.Tensor(dtype=public_pb.DTYPE_INT64, sparse_csr=SPARSE, shape=[2, 2]),
    ),
    _post(
        "gateway/tinker/training.py::_adam_params",
        "expected Adam",
        "optim_step",
        optim_params={"type": "dimuon", "learning_rate": 0.1},
    ),
    _post(
        "gateway/tinker/models.py::check_optimizer",
        "expected 'adamw'",
        "load_weights",
        path="tinker://x/weights/x",
        optimizer=False,
        optimizer_config={"type": "dimuon"},
    ),
    _post(
        WEIGHTS + "_save_for_sampler", "where weights get a name", "save_weights_for_sampler", path="x", kind="inflight"
    ),
    _post(WEIGHTS + "_save_for_sampler", "exactly one of", "save_weights_for_sampler"),
    _post(
        WEIGHTS + "_save_external",
        "does not encrypt",
        "save_weights_external",
        path="x",
        age_encryption_recipients=["age1x"],
    ),
    _post(
        "gateway/broker.py::borrow",
        "weights_access_token is 'none'",
        "load_weights",
        path="tinker://x/weights/x",
        optimizer=False,
        weights_access_token="x",
    ),
    # What the broker looks at
    Mistake(
        ADMISSION + "admit",
        "limit 67,108,864",
        lambda run: run.submit("forward", bytes(MAX_PAYLOAD_BYTES + 1)),
    ),
    Mistake(ADMISSION + "admit", "kind is 'sample'", lambda run: run.submit("sample", rows=1)),
    _post(ADMISSION + "admit", "ttl_seconds is 0", "save_weights", path="x", ttl_seconds=0),
    Mistake(ADMISSION + "_check_save", "overwrite=True", taken),
    Mistake(ADMISSION + "_check_save", "where no other sampler is", another_sampler_there),
    _post("scheduler/registry.py::checkpoint_path", "name is 'epoch/1'", "save_weights", path="epoch/1"),
    _post("scheduler/registry.py::checkpoint_path", "name is ''", "save_weights_for_sampler", path=""),
    _post(
        "scheduler/registry.py::no_checkpoint",
        "there is no checkpoint",
        "load_weights",
        path="tinker://nobody/weights/none",
        optimizer=False,
    ),
    Mistake(
        "scheduler/registry.py::readable",
        "made by save_state",
        lambda run: run.post("load_weights", path=run.saved("save_weights_for_sampler", "s"), optimizer=False),
    ),
    Mistake("scheduler/registry.py::loadable", "its own is 8", other_rank),
    # What cannot be read of a message that says who it is from and which place it has
    Mistake("wire/codec.py::decode", "arguments.name", lambda run: run.submit("save_state", arguments={"name": 5})),
    Mistake("wire/codec.py::decode", "are not MessagePack", lambda run: run.submit("forward", b"\xc1junk")),
    Mistake("wire/codec.py::decode", "data", lambda run: run.submit("forward_backward", encode({"data": 3}))),
    # What only the actor finds out
    _pass(
        "actors/training/engine.py::outcome",
        "has a loss of",
        "importance_sampling",
        **(POLICY | {"logprobs": tensor([-1e30, -1.0])}),
    ),
    Mistake("actors/training/engine.py::_stepped", "not finite", a_step_too_large),
    Mistake(
        "actors/adapters/folders.py::verify",
        "has SHA-256",
        lambda run: broken_files(run, lambda file: file.write_bytes(file.read_bytes()[:-1] + b"?")),
    ),
    Mistake(
        "actors/adapters/folders.py::verify",
        "is missing",
        lambda run: broken_files(run, lambda file: file.unlink()),
    ),
    Mistake("actors/training/trainer.py::_save_or_load", "save_state in", no_room_for_files),
]


def _target() -> dict[str, object]:
    return {"target_tokens": {"dtype": "int64", "shape": [1], "data": bytes(8)}}


def _become(message: Any, **chunk: dict[str, object]) -> None:
    """In place of the text."""
    message.data[0].model_input[0].CopyFrom(public_pb.Chunk(**chunk))
