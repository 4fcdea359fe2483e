"""`lorry top`: actors, queues, tokens a second and who waits longest, once a second, by what the broker answers."""

import os
import sys
import termios
import tty
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import anyio
import typer
from anyio import to_thread
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from lorry import options
from lorry.administration import ask, is_served_now
from lorry.calling import run_async
from lorry.printing import plain_console
from lorry.service import find_service
from lorry.tables import ONE_RUN, AsJson, print_json, table
from lorry.wire.admin_messages import LookOver
from lorry.wire.errors import ConnectionLostError
from lorry.wire.overview import ActorLoad, Job, Overview
from lorry.wire.rates import busy, tokens_per_s
from lorry.wire.words import lasting

_EVERY_S = 1.0
_PATIENCE_S = 3.0
"""Within which a broker answers, or is away."""
_LATELY = 10
"""Answers that rates are of."""
_ROWS = 10
"""Of a table: what is further down is for `lorry jobs`."""


def top(
    once: Annotated[bool, typer.Option("--once", help="Print one frame, and end")] = False,
    as_json: AsJson = False,
    connect: options.Connect = None,
    server_key: options.ServerKey = None,
    data: options.Data = None,
) -> None:
    """Watch actors, queues, tokens a second and who waits longest; q or Ctrl-C ends it."""
    if as_json and not once:
        raise typer.BadParameter("goes with --once", param_hint="--json")
    console = plain_console()

    async def run() -> None:
        if not once:
            await _watch(console, connect, server_key, data)
        elif as_json:
            print_json(await look(connect, server_key, data))
        else:
            console.print(frame(await look(connect, server_key, data), [], console.width))

    run_async(run)


async def look(connect: str | None, server_key: str | None, data: Path | None) -> Overview:
    """Where the broker listens is found anew each time. Raises ConnectionLostError where it is away."""
    service = await to_thread.run_sync(find_service, connect, server_key, data)
    if not is_served_now(service):
        raise ConnectionLostError(f"no broker serves {service.data}")
    with anyio.move_on_after(_PATIENCE_S):
        return await ask(service, LookOver(), Overview)
    raise ConnectionLostError(f"the broker at {service.address} has not answered for {_PATIENCE_S:g} s")


async def _watch(console: Console, connect: str | None, server_key: str | None, data: Path | None) -> None:
    earlier = deque[Overview](maxlen=_LATELY)
    with _keys(), Live(console=console, screen=True, auto_refresh=False) as live:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_end_at_q, tasks.cancel_scope)
            while True:
                try:
                    now = await look(connect, server_key, data)
                except ConnectionLostError as error:
                    shown = away(str(error), earlier[-1] if earlier else None)
                else:
                    shown = frame(now, earlier, console.width)
                    earlier.append(now)
                live.update(shown, refresh=True)
                await anyio.sleep(_EVERY_S)


@contextmanager
def _keys() -> Generator[None]:
    """Each key comes at once, and is not shown."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


async def _end_at_q(watching: anyio.CancelScope) -> None:
    if not sys.stdin.isatty():
        return
    while True:
        await anyio.wait_readable(sys.stdin)
        pressed = os.read(sys.stdin.fileno(), 64)  # sys.stdin would read ahead, and what it has wakes nobody
        if not pressed or b"q" in pressed.lower():
            watching.cancel()
            return


# What is shown, pure -------------------------------------------------------------------------------------------------


def away(why: str, last: Overview | None) -> RenderableType:
    heard = "" if last is None else f" It was last heard at {_clock(last.at)} UTC."
    return Text.assemble(("The broker is away. ", "red"), f"{why}{heard} This goes on when it is back; q ends it.")


def frame(now: Overview, earlier: Sequence[Overview], width: int) -> RenderableType:
    lines = [Text(f"{_clock(now.at)} UTC. Not over: {now.commands:,} requests, {now.queued_tokens:,} tokens.")]
    if now.loading:
        lines.append(Text(f"Being loaded: {', '.join(now.loading)}."))
    if now.trouble is not None:
        lines.append(Text(now.trouble, "red"))
    return Group(*lines, *_tables(now, earlier, width))


def _tables(now: Overview, earlier: Sequence[Overview], width: int) -> Sequence[RenderableType]:
    actors = [_actor(actor, earlier) for actor in now.actors]
    columns = ("actor, model", "state", "device", "busy", "runs", "holds")
    found: list[RenderableType] = [table(columns, actors, "Actors", {"busy": 10, "holds": 16}, width)]
    if now.queues:
        rows = [
            (each.tenant, each.base_model, each.kind, f"{each.commands:,}", f"{each.tokens:,}")
            for each in now.queues[:_ROWS]
        ]
        columns = ("tenant", "base model", "kind", "commands", "tokens")
        found.append(table(columns, rows, "Not over, by tenant", {"kind": 16}, width))
    if now.tokens:
        rates = tokens_per_s(earlier, now)
        counted = [(kind, f"{n:,}", f"{rates[kind]:,.0f}" if kind in rates else "") for kind, n in now.tokens.items()]
        found.append(table(("kind", "tokens", "a second"), counted, "Tokens since the broker started", width=width))
    if now.oldest:
        rows = [_job(job, now.at) for job in now.oldest]
        found.append(table(("request, tenant", "why"), rows, "Who waits longest", {"request, tenant": ONE_RUN}, width))
    return found


def _actor(actor: ActorLoad, earlier: Sequence[Overview]) -> tuple[str, ...]:
    share = busy(earlier, actor)
    return (
        f"{actor.actor}\n{actor.base_model}",
        _state(actor),
        f"{actor.device}\n{actor.dtype}",
        "" if share is None else f"train {share.train:.0%}\nsample {share.sample:.0%}",
        f"{actor.runs:,}",
        f"{actor.tokens:,} tokens\n{actor.sequences:,} sequences",
    )


def _state(actor: ActorLoad) -> str:
    does = [name for name, has in (("trains", actor.tokens), ("samples", actor.sequences)) if has]
    return "leaves" if actor.is_leaving else "\n".join(does) or "idle"


def _job(job: Job, at: float) -> tuple[str, str]:
    state = "" if job.state == "active" else f"{job.state}: "
    return f"{job.future}\n{job.tenant}", f"{job.kind}, for {lasting(at - job.accepted_at)}\n{state}{job.reason}"


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%H:%M:%S")
