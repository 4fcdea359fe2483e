"""What the time of an answer tells of another tenant's things: every message of the native wire, and every route over
HTTP, asked with another's ids and with ids that nobody has, in turns and in an order of chance.

What is asked, and of whose, is what `tests/scheduler/test_privacy.py` and `tests/gateway/test_privacy.py` ask, whose
answers they find to be the same. Prints, for each, the median of the differences of neighbours with its quartiles,
beside the same of two ids that nobody has, and what a rank test (Mann-Whitney) makes of each: how often chance alone
would have found as much in as many questions (Bonferroni). Ends with a JSON line.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import anyio
import anyio.lowlevel
import httpx
from anyio import to_thread
from rich.console import Console
from rich.table import Table
from scipy.stats import mannwhitneyu

import lorry
from bench.goals import settle
from lorry.actors.config import ActorSettings
from lorry.client.connection import Connection, open_connection
from lorry.config import ModelConfig, ServeConfig
from lorry.serve import serving
from lorry.wire.catalogue_messages import ClientSessionCreated, CreateClientSession
from lorry.wire.client_messages import CreateSampler, SamplerCreated, Submit
from lorry.wire.errors import ProtocolError
from lorry.wire.ids import LaneId, future_id
from tests.conftest import MODEL
from tests.gateway import test_privacy as over_http
from tests.scheduler import test_privacy as native

BASE_MODEL, WARM_UP, CHANCE = Path("tests/assets/base-model"), 10, 0.01
SEED = 0

Ask = Callable[[], Awaitable[object]]
Question = tuple[Ask, Ask, Ask]
"""With another's ids, with some that nobody has, and with others that nobody has."""


@dataclass(frozen=True, slots=True)
class Found:
    """Microseconds: what another's ids take, how much more than nobody's (median and quartiles), and how much more than
    these other ids that nobody has; and the chances of either."""

    question: str
    took_us: float
    more_us: tuple[float, float, float]
    chance: float
    nobodys_us: tuple[float, float, float]
    nobodys_chance: float


async def measure(data: Path, repetitions: int, only: str) -> list[Found]:
    models = tuple(ModelConfig(name, str(BASE_MODEL)) for name in ("m", MODEL))
    actor = ActorSettings(threads=1)
    config = ServeConfig(models, data, "tcp://127.0.0.1:*", "127.0.0.1:0", actor=actor, log_level="error")
    async with serving(config) as deployment:
        hers, his = [await deployment.create_key(tenant) for tenant in ("alice", "mallory")]
        async with (
            lorry.connect(deployment.address, api_key=hers) as client,
            open_connection(deployment.address, hers) as alice,
            open_connection(deployment.address, his) as mallory,
        ):
            things = await alices(client, alice, hers)
            found = [
                await compared(name, question, repetitions)
                for name, question in native_questions(mallory, things).items()
                if only in name
            ]
        url = f"{deployment.url}/api/v1"
        with (
            httpx.Client(base_url=url, headers={"X-API-Key": hers}, timeout=None) as http,
            httpx.Client(base_url=url, headers={"X-API-Key": his}, timeout=None) as asking,
        ):
            theirs = await to_thread.run_sync(over_http.alices, http)
            return found + [
                await compared(name, question, repetitions)
                for name, question in http_questions(asking, theirs).items()
                if only in name
            ]


async def alices(client: lorry.ServiceClient, alice: Connection, key: str) -> native.Things:
    """As in the test, where the actor is another."""
    training = await client.create_lora_training_client_async("m", rank=4)
    await training.forward_backward([native.DATUM], "cross_entropy")
    saved = await training.save_state("kept")
    session = await alice.ask(CreateClientSession(alice.next_request(), "bench"), ClientSessionCreated)
    create = CreateSampler(alice.next_request(), "nonce-of-alices-sampler", base_model="m")
    run, lane = training.model_id, LaneId((await alice.ask(create, SamplerCreated)).sampler)
    sampled = alice.expect(future_id(lane, 0))
    alice.submit(Submit(alice.next_request(), lane, 0, "sample"), b"", sampled)
    with suppress(ProtocolError):  # there is nothing in it
        await sampled
    return native.Things(run, lane, f"{run}:0", f"{lane}:0", saved.path, session.session, key, "nonce-of-alice")


def native_questions(mallory: Connection, things: native.Things) -> dict[str, Question]:
    """Of each message that names something."""
    same = {"key": "tml-" + "0" * (len(things.key) - 4), "nonce": "0" * len(things.nonce)}
    nobodys = replace(native.NOBODYS, **same)
    others = native.Things(
        *(getattr(nobodys, field).replace("00000000", "11111111") for field in native.Things.__slots__)
    )

    def asked(ask: Callable[[int, native.Things], object], of: native.Things) -> Ask:
        return lambda: native.outcome(mallory, ask, of)

    return {
        f"{kind.__name__} {number}": (asked(ask, things), asked(ask, nobodys), asked(ask, others))
        for kind, asks in native.ASKS.items()
        for number, ask in enumerate(asks)
        if ask(0, things) != ask(0, nobodys)
    }


def http_questions(http: httpx.Client, things: over_http.Things) -> dict[str, Question]:
    nobodys = replace(over_http.NOBODYS, request_id=things.request_id.replace(things.run_id, over_http.NOBODYS.run_id))
    others = over_http.Things(
        *(getattr(nobodys, field).replace("00000000", "11111111") for field in over_http.Things.__slots__)
    )

    def asked(method: str, path: str, of: over_http.Things) -> Ask:
        async def ask() -> object:
            return over_http.asked(http, method, path, of)

        return ask

    return {
        f"{method} {path}": (asked(method, path, things), asked(method, path, nobodys), asked(method, path, others))
        for method, path in over_http.routes()
        if path not in over_http.NAME_NOTHING
    }


async def compared(name: str, question: Question, repetitions: int) -> Found:
    times: tuple[list[float], ...] = ([], [], [])
    order, chance = [0, 1, 2], random.Random(SEED)
    for repetition in range(WARM_UP + repetitions):
        chance.shuffle(order)
        for which in order:
            started = time.perf_counter()
            await question[which]()
            took = 1e6 * (time.perf_counter() - started)
            if repetition >= WARM_UP:
                times[which].append(took)
            await anyio.lowlevel.checkpoint()  # the servers' supervisor is in this loop, too
    theirs, nobodys, others = times
    return Found(
        name,
        statistics.median(theirs),
        differences(theirs, nobodys),
        float(mannwhitneyu(theirs, nobodys).pvalue),
        differences(others, nobodys),
        float(mannwhitneyu(others, nobodys).pvalue),
    )


def differences(more: Sequence[float], less: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles([a - b for a, b in zip(more, less, strict=True)], n=4)
    return middle, low, high


def shown(of: tuple[float, float, float]) -> str:
    return f"{of[0]:.0f} ({of[1]:.0f} to {of[2]:.0f})"


def main(arguments: list[str] | None = None) -> list[str]:
    """Returns what was found that chance does not explain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--only", default="", help="questions whose names hold this")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as data:
        found = anyio.run(measure, Path(data), options.repetitions, options.only)
    table = Table("question", "took, µs", "more, µs", "chance", "nobody's, µs", "chance", title="another tenant's ids")
    questions = len(found)
    for each in found:
        by_chance = (f"{min(1.0, p * questions):.3f}" for p in (each.chance, each.nobodys_chance))
        mine, nobodys = by_chance
        table.add_row(each.question, f"{each.took_us:.0f}", shown(each.more_us), mine, shown(each.nobodys_us), nobodys)
    Console(width=160).print(table)
    print(json.dumps({"bench": "others_ids", "found": [asdict(each) for each in found]}))
    largest = max(abs(each.more_us[0]) for each in found), max(abs(each.nobodys_us[0]) for each in found)
    print(f"{questions} questions; the largest median: {largest[0]:.0f} µs, of nobody's ids {largest[1]:.0f} µs")
    return [
        f"{each.question}: another's ids take {each.more_us[0]:.0f} µs more, which chance does not explain"
        for each in found
        if each.chance * questions < CHANCE
    ]


if __name__ == "__main__":
    settle(main())
