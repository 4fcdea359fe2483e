"""What a run's numbers take: bytes a step in the database, time of a command's transaction, and what a plot of many
steps reads. Without a broker: the store alone. Prints a table and a JSON line.
"""

import argparse
import json
import tempfile
import time
from contextlib import closing
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.goals import at_most, settle
from lorry.storage.connection import FILE
from lorry.storage.rows import RunRow
from lorry.storage.store import Store
from lorry.wire.codec import encode
from lorry.wire.ids import RunId, TenantId
from lorry.wire.metrics import POINTS_AT_ONCE, MetricPoint
from lorry.wire.thinning import Thinning
from lorry.wire.types import LoraConfig

RUN = RunId("session-0123456789abcdef:train:0")
BYTES_A_STEP = 200
AT_MOST_POINTS = 1000
A_COMMIT = 100


def training(store: Store, steps: int) -> float:
    """Microseconds of a command: a forward_backward and an optim_step for each step, a hundred to a commit."""
    started = time.perf_counter()
    for first in range(0, steps, A_COMMIT):
        with store.transaction():
            for step in range(first, min(first + A_COMMIT, steps)):
                store.step_measured(RUN, "forward_backward", {"loss:sum": 1.0 / (step + 1)}, 8, float(step))
                store.step_measured(RUN, "optim_step", {"grad_norm": 0.5 / (step + 1)}, 0, float(step))
    return 1e6 * (time.perf_counter() - started) / (2 * steps)


def loop(store: Store, steps: int, names: int) -> float:
    """Microseconds of a step that is logged, a thousand to a message."""
    started = time.perf_counter()
    for first in range(0, steps, POINTS_AT_ONCE):
        points = [
            MetricPoint(step, {f"env/all/metric_{i}": step / (i + 1) for i in range(names)})
            for step in range(first, min(first + POINTS_AT_ONCE, steps))
        ]
        with store.transaction():
            store.metrics_logged(RUN, points, 0.0)
    return 1e6 * (time.perf_counter() - started) / steps


def thinned(store: Store) -> tuple[float, int]:
    """Seconds, and bytes of the answer."""
    started = time.perf_counter()
    thinning, after = Thinning(store.metric_steps(RUN), AT_MOST_POINTS), None
    while True:
        page = store.run_metrics(RUN, after, POINTS_AT_ONCE)
        for point in page.points:
            thinning.add(point)
        if (after := page.next) is None:
            return time.perf_counter() - started, len(encode(thinning.points()))


def size(store: Store, data: Path) -> int:
    store.checkpoint_wal()
    return (data / FILE).stat().st_size


def main(arguments: list[str] | None = None) -> list[str]:
    """Returns the goals that were missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--names", type=int, default=20, help="that a loop logs at each step")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder, closing(Store(data := Path(folder))) as store:
        store.create_key(TenantId("bench"), 0.0)
        store.run_created(RunRow(RUN, TenantId("bench"), "nonce", "m", LoraConfig(seed=0), {}, 0.0, 0.0))
        sizes = [size(store, data)]
        command_us = training(store, options.steps)
        sizes.append(size(store, data))
        read_s, answer = thinned(store)
        logged_us = loop(store, options.steps, options.names)
        sizes.append(size(store, data))
        both_s, _ = thinned(store)
    bytes_a_step, of_loop = ((after - before) / options.steps for before, after in pairwise(sizes))
    table = Table("", "found", "goal", title=f"{options.steps:,} steps")
    table.add_row("bytes a step of training, in the database", f"{bytes_a_step:.0f}", f"{BYTES_A_STEP}")
    table.add_row("of each command's transaction, µs", f"{command_us:.0f}", "")
    table.add_row(f"bytes a step of a loop with {options.names} names", f"{of_loop:.0f}", "")
    table.add_row("of each step that is logged, µs", f"{logged_us:.0f}", "")
    table.add_row(f"seconds to thin those of training to {AT_MOST_POINTS:,} points a name", f"{read_s:.2f}", "")
    table.add_row(f"seconds to thin them with {options.names} names of the loop", f"{both_s:.2f}", "")
    table.add_row("bytes of the answer without those", f"{answer:,}", "")
    Console().print(table)
    found = {"bytes_a_step": bytes_a_step, "command_us": command_us, "loop_bytes": of_loop, "logged_us": logged_us}
    print(json.dumps({"bench": "metrics"} | found | {"thin_s": read_s, "thin_both_s": both_s, "answer_bytes": answer}))
    return at_most("bytes a step of training", bytes_a_step, BYTES_A_STEP)


if __name__ == "__main__":
    settle(main())
