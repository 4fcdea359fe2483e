"""What of a tenant is not over, why, and for about how long."""

from collections import Counter
from collections.abc import Mapping

from fastapi import APIRouter
from starlette.responses import Response

from ...wire.catalogue_messages import OwnJobs
from ...wire.overview import JOBS_AT_MOST, Jobs
from ..broker import Broker
from .rendering import page
from .visiting import VisitorOf

router = APIRouter()


async def jobs_of(broker: Broker, run: str | None = None, limit: int = JOBS_AT_MOST) -> Jobs:
    """The oldest."""
    return await broker.ask(lambda number: OwnJobs(number, run, limit=limit), Jobs)


def count_by_run(jobs: Jobs) -> Mapping[str, int]:
    """Samples of its weights among them."""
    return Counter(job.run or job.lane for job in jobs.jobs)


@router.get("/waiting")
async def waiting(visitor: VisitorOf) -> Response:
    return page(visitor, "waiting.html", jobs=await jobs_of(visitor.broker))
