"""A run's numbers: written with what they come from, once, whatever dies; and logged beside by their owner alone."""

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import lorry
from lorry.client.connection import Connection, open_connection
from lorry.client.rest import RestClient
from lorry.client.training import TrainingClient
from lorry.wire.client_messages import CreateRun, RunCreated
from lorry.wire.codec import decode, encode
from lorry.wire.errors import InvalidRequestError, LimitReachedError, LorryError, MessageTooLargeError, NotFoundError
from lorry.wire.ids import RunId, TenantId
from lorry.wire.metrics import LatestMetrics, LogMetrics, MetricPoint, RunPoint, SourcedPoint, point_of
from lorry.wire.types import AdamParams, LoraConfig

from .test_client_door import DATUM, Serving

INF, NAN = math.inf, math.nan


def told(points: list[SourcedPoint]) -> list[tuple[str, int, dict[str, float]]]:
    return [(point.source, point.step, point.values) for point in points]


async def a_run(connection: Connection) -> TrainingClient:
    created = await connection.ask(CreateRun(connection.next_request(), "once", "m", LoraConfig(rank=4)), RunCreated)
    return TrainingClient(connection, RunId(created.run))


async def test_a_steps_passes_are_one_point_and_the_count_goes_on_in_a_new_broker(tmp_path: Path) -> None:
    for life in range(2):
        async with Serving(tmp_path) as service:
            service.may_work.set()
            key = service.store.create_key(TenantId("alice"), 1.0)
            async with open_connection(service.address, key) as connection:
                run = RunId((await a_run(connection)).model_id)
                training = TrainingClient(connection, run, next_seq=8 * life)
                for _ in range(2):
                    await training.forward_backward([DATUM], "cross_entropy")
                    await training.forward_backward([DATUM], "cross_entropy")
                    await training.forward([DATUM], "cross_entropy")
                    await training.optim_step(AdamParams())
                found = told(await RestClient(connection).get_run_metrics_async(run))
                steps = range(2 + 2 * life)
                assert found == [("training", step, {"loss:sum": 2.0, "grad_norm": 0.5}) for step in steps]


async def test_what_a_loop_logs_is_merged_name_by_name_and_whatever_a_float_may_be(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service, lorry.connect(service.address, api_key=service.key) as client:
        service.may_work.set()
        training, rest = await client.create_lora_training_client_async("m", rank=4), client.create_rest_client()
        await training.log_metrics({"reward": 0.5, "kl": NAN}, step=3)
        training.log_metrics({"reward": 1, "up": INF, "down": -INF}, step=3, at=12.5)
        await training.log_metrics_async({"reward": 2.0}, step=1)
        await training.forward_backward([DATUM], "cross_entropy")
        found = await rest.get_run_metrics_async(training.model_id)
        assert [(each[0], each[1]) for each in told(found)] == [("training", 0), ("loop", 1), ("loop", 3)]
        values = found[2].values
        assert math.isnan(values.pop("kl")) and values == {"reward": 1.0, "up": INF, "down": -INF}
        assert found[2].at == 12.5
        assert [point.values for point in await rest.get_run_metrics_async(training.model_id, names=["reward"])] == [
            {"reward": 2.0},
            {"reward": 1.0},
        ]


async def test_many_points_are_read_page_by_page_and_thinned_where_they_are_kept(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service, lorry.connect(service.address, api_key=service.key) as client:
        service.may_work.set()
        training, rest = await client.create_lora_training_client_async("m", rank=4), client.create_rest_client()
        points = [MetricPoint(step, {"x": float(step % 97), "y": 1.0}, at=1.0) for step in range(2500)]
        await rest.log_run_metrics_async(training.model_id, points)
        pages = [page async for page in rest.run_metrics_pages(training.model_id)]
        assert [len(page) for page in pages] == [1000, 1000, 500]
        assert [point.step for page in pages for point in page] == list(range(2500))
        thin = await rest.get_run_metrics_async(training.model_id, at_most_points=50, names=["x"])
        assert len(thin) <= 50 and (thin[0].step, thin[-1].step) == (0, 2499)
        assert {0.0, 96.0} <= {point.values["x"] for point in thin}


async def test_of_many_names_fewer_points_are_kept_of_each(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service, lorry.connect(service.address, api_key=service.key) as client:
        training, rest = await client.create_lora_training_client_async("m", rank=4), client.create_rest_client()
        points = [MetricPoint(step, {f"{i}": step % 7 * 1.0 for i in range(250)}) for step in range(300)]
        await rest.log_run_metrics_async(training.model_id, points)
        thin = await rest.get_run_metrics_async(training.model_id, at_most_points=10_000)
        assert 0 < len(thin) <= 200 and sum(len(point.values) for point in thin) <= 50_000
        assert len(await rest.get_run_metrics_async(training.model_id, at_most_points=10_000, names=["7"])) == 300


async def test_the_newest_of_a_run_are_told_up_to_a_thousand_in_all(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service, open_connection(service.address, service.key) as connection:
        run = RunId((await a_run(connection)).model_id)
        points = [MetricPoint(step, {"x": 1.0}) for step in range(150)]
        await RestClient(connection).log_run_metrics_async(run, points)
        found = await connection.ask(LatestMetrics(connection.next_request(), [run], 100), list[RunPoint])
        assert [point.step for point in found] == list(range(50, 150))
        with pytest.raises(InvalidRequestError, match="most is 100, expected up to 90 of each of 11 runs"):
            await connection.ask(LatestMetrics(connection.next_request(), [run] * 11, 100), list[RunPoint])
        with pytest.raises(InvalidRequestError, match="<= 100"):
            await connection.ask(LatestMetrics(connection.next_request(), [run], 101), list[RunPoint])


@pytest.mark.parametrize(
    ("points", "error", "says"),
    [
        ([MetricPoint(0, {"": 1.0})], InvalidRequestError, "points\\[0\\].values is '', expected names of 1 to 200"),
        ([MetricPoint(0, {"x" * 201: 1.0})], InvalidRequestError, "names of 1 to 200 characters"),
        ([MetricPoint(0, {"x" * 200 + "é": 1.0})], InvalidRequestError, "characters of Unicode"),
        (
            [MetricPoint(0, {"x": 1.0})] * 2 + [MetricPoint(0, {"x": 1.0, "": 1.0})],
            InvalidRequestError,
            "points\\[2\\]",
        ),
        ([MetricPoint(-1, {"x": 1.0})], InvalidRequestError, ">= 0"),
        ([MetricPoint(0, {"x": "1"})], InvalidRequestError, "Expected `float`"),  # type: ignore[dict-item]
        ([MetricPoint(0, {"x": 1.0}, NAN)], InvalidRequestError, "points\\[0\\].at is nan, expected Unix seconds"),
        ([MetricPoint(0, {"x": 1.0})] * 1001, MessageTooLargeError, "there are 1,001 points, the limit is 1,000"),
        ([MetricPoint(0, {f"x{i}": 1.0 for i in range(257)})], LimitReachedError, "may have 256 in all"),
    ],
)
async def test_what_cannot_be_kept_is_refused_by_name_and_value_and_changes_nothing(
    tmp_path: Path, points: list[MetricPoint], error: type[LorryError], says: str
) -> None:
    async with Serving(tmp_path) as service, open_connection(service.address, service.key) as connection:
        service.may_work.set()
        training = await a_run(connection)
        run = RunId(training.model_id)
        with pytest.raises(error, match=says):
            await connection.tell(LogMetrics(connection.next_request(), run), encode(points))
        assert await RestClient(connection).get_run_metrics_async(run) == []
        await training.log_metrics({f"x{i}": 1.0 for i in range(256)}, step=0)
        await training.forward_backward([DATUM], "cross_entropy")
        assert len(await RestClient(connection).get_run_metrics_async(run)) == 1, "no name is left for its training's"


async def test_anothers_run_is_nobodys(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service:
        service.may_work.set()
        async with (
            open_connection(service.address, service.key) as alice,
            open_connection(service.address, service.store.create_key(TenantId("mallory"), 1.0)) as mallory,
        ):
            run = RunId((await a_run(alice)).model_id)
            with pytest.raises(NotFoundError, match="there is no run"):
                await RestClient(mallory).log_run_metrics_async(run, [MetricPoint(0, {"x": 1.0})])
            with pytest.raises(NotFoundError, match="there is no run"):
                await RestClient(mallory).get_run_metrics_async(run)
            with pytest.raises(NotFoundError, match="there is no run"):
                await RestClient(mallory).get_lineage_async(run)
            assert await RestClient(alice).get_run_metrics_async(run) == []


@pytest.mark.parametrize(
    ("metrics", "step", "at", "says"),
    [
        ({"x": "1.5"}, 0, None, "metrics\\['x'\\] is '1.5', expected a number"),
        ({"x": None}, 0, None, "metrics\\['x'\\] is None, expected a number"),
        ({1: 1.0}, 0, None, "metrics is 1, expected names that are strings"),
        ({"x": 1.0}, 1.0, None, "step is 1.0, expected a count"),
        ({"x": 1.0}, True, None, "step is True, expected a count"),
        ({"x": 1.0}, None, None, "step is None, expected a count"),
        ({"x": 1.0}, "1", None, "step is '1', expected a count"),
        ({"x": 1.0}, 0, "noon", "at is 'noon', expected a number"),
        ({"x": 1.0}, 0, NAN, "points\\[0\\].at is nan, expected Unix seconds"),
        ({"x": "much"}, 0, None, "metrics\\['x'\\] is 'much', expected a number"),
        ({"x": 10**400}, 0, None, "metrics\\['x'\\]"),
        ({"x\ud800": 1.0}, 0, None, "points\\[0\\].values"),
        ({"x": 1.0}, -1, None, "step is -1, expected a count from 0 on"),
        ({"x": 1.0}, 2**62, None, "step is"),
    ],
)
async def test_what_is_no_number_name_or_step_is_refused_at_the_call(
    tmp_path: Path, metrics: Any, step: Any, at: Any, says: str
) -> None:
    async with Serving(tmp_path) as service, open_connection(service.address, service.key) as connection:
        with pytest.raises(InvalidRequestError, match=says):
            (await a_run(connection)).log_metrics(metrics, step, at)


def test_numbers_and_counts_of_numpys_types_travel() -> None:
    point = point_of(cast(int, np.int64(3)), {"x": np.float32(0.5), "n": np.int32(2)}, cast(float, np.float64(1.5)))
    assert decode(encode([point]), list[MetricPoint]) == [MetricPoint(3, {"x": 0.5, "n": 2.0}, 1.5)]
