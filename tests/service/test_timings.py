"""How long things take: `make timings`, on a machine that does nothing else. No other test asks that."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import BASE_MODEL, ROOT, start_server
from tests.service.test_processes import family

pytestmark = pytest.mark.timed

IDLE_S = 10.0
MAX_IDLE_SHARE_OF_A_CORE = 0.01
MAX_START_S = 8.0
MAX_STOP_S = 6.0
MAX_DEMO_S = 180.0


@pytest.mark.parametrize("options", [(), ("--http", "127.0.0.1:0")], ids=["without HTTP", "with HTTP"])
def test_all_processes_start_fast_idle_and_stop_fast(tmp_path: Path, options: tuple[str, ...]) -> None:
    limit = max(MAX_START_S, 2 * bare_load_s())
    started = time.monotonic()
    server = start_server(tmp_path, "--heartbeat-s", "5", *options)  # as it is where nobody says another
    try:
        assert time.monotonic() - started < limit
        processes = family(server)

        def used() -> float:
            return sum(sum(p.cpu_times()[:2]) for p in processes)

        time.sleep(1)
        before = used()
        time.sleep(IDLE_S)
        assert used() - before < MAX_IDLE_SHARE_OF_A_CORE * IDLE_S
    finally:
        stopping = time.monotonic()
        server.stop()
    assert time.monotonic() - stopping < MAX_STOP_S


def bare_load_s() -> float:
    """What loading the model with transformers alone takes: where that is half the limit or more, the limit is twice
    that."""
    started = time.perf_counter()
    load = f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({str(BASE_MODEL)!r})"
    subprocess.run([sys.executable, "-c", load], check=True, capture_output=True)
    return time.perf_counter() - started


def test_the_demo_takes_less_than_three_minutes() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "lorry", "demo"], cwd=ROOT, env=environment, check=True, capture_output=True)
    assert time.monotonic() - started < MAX_DEMO_S
