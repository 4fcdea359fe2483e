"""Results as the SDK reads them: passes and samples as protobuf, or as JSON where it is not asked for."""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from tinker.proto import tinker_public_pb2 as public_pb

from ...wire.types import ForwardBackwardOutput, LossFnOutput, SampledSequence, SampleResponse, TensorData, TopkLogprobs

_NO_LOGPROB = -99999.0
"""How the SDK marks places of a top-k table that hold nothing; `tinker.types.topk_logprobs`."""
_DTYPES = {"float32": public_pb.DTYPE_FLOAT32, "int64": public_pb.DTYPE_INT64}


def pass_to_protobuf(output: ForwardBackwardOutput) -> bytes:
    """Outputs are laid end to end by field; a new record begins where a field's shape after the first axis changes."""
    message = public_pb.ForwardBackwardOutput(loss_fn_output_type=output.loss_fn_output_type, metrics=output.metrics)
    for _, alike in groupby(output.loss_fn_outputs, _layout):
        datums = list(alike)
        record = message.loss_fn_outputs.add(type_tag=output.loss_fn_output_type, num_datums=len(datums))
        for name in datums[0]:
            _lay_end_to_end([datum[name] for datum in datums], record.fields[name])
    return message.SerializeToString()


def _layout(output: LossFnOutput) -> list[tuple[str, str, list[int]]]:
    return [(name, tensor.dtype, tensor.shape[1:]) for name, tensor in output.items()]


def _lay_end_to_end(tensors: Sequence[TensorData], into: public_pb.BatchedTensor) -> None:
    pieces = [tensor.to_numpy().tobytes() for tensor in tensors]
    into.data = b"".join(pieces)
    into.offsets = np.cumsum([0, *map(len, pieces)], dtype="<i8").tobytes()
    into.dtype = _DTYPES[tensors[0].dtype]
    into.trailing_shape.extend(tensors[0].shape[1:])


def pass_to_json(output: ForwardBackwardOutput) -> dict[str, object]:
    return {
        "loss_fn_output_type": output.loss_fn_output_type,
        "loss_fn_outputs": [{name: _plain(t) for name, t in datum.items()} for datum in output.loss_fn_outputs],
        "metrics": output.metrics,
    }


def _plain(tensor: TensorData) -> dict[str, object]:
    return {"data": tensor.data, "dtype": tensor.dtype, "shape": tensor.shape}


def sample_to_protobuf(response: SampleResponse) -> bytes:
    message = public_pb.SampleResponse()
    for sequence in response.sequences:
        _write_sequence(sequence, message.sequences.add())
    if response.prompt_logprobs is not None:
        unknown = [np.nan if logprob is None else logprob for logprob in response.prompt_logprobs]
        message.prompt_logprobs = np.asarray(unknown, dtype="<f4").tobytes()
    if response.topk_prompt_logprobs is not None:
        _write_table(response.topk_prompt_logprobs, message.topk_prompt_logprobs)
    if response.target_prompt_logprobs is not None:
        _write_targets(response.target_prompt_logprobs, message.target_prompt_logprobs, sparse=response.sparse_targets)
    if response.prompt_alt_tokens is not None:
        _write_tensor(response.prompt_alt_tokens.tokens, message.prompt_alt_tokens.tokens)
        _write_tensor(response.prompt_alt_tokens.logprobs, message.prompt_alt_tokens.logprobs)
    message.prompt_cache_hit_tokens = response.prompt_cache_hit_tokens
    return message.SerializeToString()


def _write_targets(found: TensorData, into: public_pb.Tensor, *, sparse: bool) -> None:
    """As the request laid its token ids out: 0 where it asked for nothing, or only the cells that it listed."""
    values = found.to_numpy()
    if not sparse:
        _write_tensor(TensorData(np.nan_to_num(values, nan=0.0)), into)
        return
    listed = ~np.isnan(values)
    into.dtype = _DTYPES[found.dtype]
    into.shape.extend(values.shape)
    into.sparse_csr.values = values[listed].tobytes()
    into.sparse_csr.crow_indices = np.cumsum([0, *listed.sum(1)], dtype="<i8").tobytes()
    into.sparse_csr.col_indices = listed.nonzero()[1].astype("<i8").tobytes()


def _write_tensor(tensor: TensorData, into: public_pb.Tensor) -> None:
    into.dtype = _DTYPES[tensor.dtype]
    into.shape.extend(tensor.shape)
    into.dense = tensor.to_numpy().tobytes()


def _write_sequence(sequence: SampledSequence, into: public_pb.SampledSequence) -> None:
    stopped = sequence.stop_reason == "stop"
    into.stop_reason = public_pb.STOP_REASON_STOP if stopped else public_pb.STOP_REASON_LENGTH
    into.tokens = np.asarray(sequence.tokens, dtype="<i4").tobytes()
    into.logprobs = np.asarray(sequence.logprobs, dtype="<f4").tobytes()
    if sequence.topk_logprobs is not None:
        _write_table(sequence.topk_logprobs, into.topk_sampled_logprobs)


def _write_table(rows: "Sequence[TopkLogprobs | None]", into: public_pb.TopkLogprobs) -> None:
    """A dense [rows, k] of tokens and one of logprobs."""
    k = max((len(row) for row in rows if row), default=0)
    tokens = np.zeros((len(rows), k), dtype="<i4")
    logprobs = np.full((len(rows), k), _NO_LOGPROB, dtype="<f4")
    for i, row in enumerate(rows):
        if row:
            tokens[i, : len(row)] = [token for token, _ in row]
            logprobs[i, : len(row)] = [logprob for _, logprob in row]
    into.token_ids, into.logprobs = tokens.tobytes(), logprobs.tobytes()
    into.k, into.length = k, len(rows)


def sample_to_json(response: SampleResponse) -> dict[str, object]:
    alternatives = response.prompt_alt_tokens
    return {
        "type": "sample",
        "sequences": [
            {
                "stop_reason": s.stop_reason,
                "tokens": s.tokens,
                "logprobs": s.logprobs,
                "topk_logprobs": s.topk_logprobs,
            }
            for s in response.sequences
        ],
        "prompt_logprobs": response.prompt_logprobs,
        "topk_prompt_logprobs": response.topk_prompt_logprobs,
        "target_prompt_logprobs": _plain_targets(response.target_prompt_logprobs),
        "prompt_alt_tokens": None
        if alternatives is None
        else {"tokens": _plain(alternatives.tokens), "logprobs": _plain(alternatives.logprobs)},
        "prompt_cache_hit_tokens": response.prompt_cache_hit_tokens,
    }


def _plain_targets(found: TensorData | None) -> dict[str, object] | None:
    return None if found is None else _plain(TensorData(np.nan_to_num(found.to_numpy(), nan=0.0)))
