"""Between client and broker, gateway and broker, broker and actor: whatever the network does, it costs time alone.

Each test runs the same loops through a good network and through a bad one, and compares all that they saw.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal

import lorry
from lorry.storage.store import Store
from lorry.wire.ids import TenantId
from tests.conftest import MODEL
from tests.service.test_recovery import learn

from . import parts
from .cables import Cables, bad_at_connections
from .messages import Mischief, bad_at_messages
from .programs import KINDS, Report, Work, billed, finish, sent

HEARTBEAT_S = 2.0
STEPS = 6


@dataclass(frozen=True, slots=True)
class Deployment:
    """All parts, with a network before each of the broker's doors; `bad` makes both of them bad."""

    data: Path
    portal: BlockingPortal
    address: str
    url: str
    mischief: tuple[Mischief, Mischief]
    cables: tuple[Cables, Cables]

    def new_key(self, tenant: str) -> str:
        with closing(Store(self.data)) as store:
            return store.create_key(TenantId(tenant), time.time())

    def learn(self, tenant: str, api: str) -> list[Report]:
        """A loop of each kind, one after the other: what trains alone is computed the same way to the last bit."""
        key = self.new_key(tenant)
        return [finish(Work(api, kind, STEPS).start(key, self.address, self.url)) for kind in KINDS]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    data = tmp_path_factory.mktemp("network")
    with ExitStack() as stack:
        portal = stack.enter_context(start_blocking_portal())
        broker = stack.enter_context(parts.broker(data, HEARTBEAT_S)).announced
        mischief, cables, doors = [], [], []
        for seed, door in enumerate((broker["clients"], broker["actors"])):
            mischief.append(Mischief(seed=seed))
            far = stack.enter_context(portal.wrap_async_context_manager(bad_at_messages(door, mischief[-1])))
            cables.append(Cables(far, seed))
            doors.append(stack.enter_context(portal.wrap_async_context_manager(bad_at_connections(cables[-1]))))
        stack.enter_context(parts.actor(doors[1]))
        url = stack.enter_context(parts.gateway(doors[0], data)).announced["url"]
        yield Deployment(data, portal, doors[0], url, tuple(mischief), tuple(cables))


@pytest.fixture(scope="module")
def expected(deployment: Deployment) -> list[Report]:
    return deployment.learn("calm", "lorry")


@pytest.mark.parametrize("api", ["lorry", "tinker"])
def test_messages_that_are_lost_repeated_and_late_change_nothing(
    deployment: Deployment, expected: list[Report], api: str
) -> None:
    for mischief in deployment.mischief:
        mischief.lost, mischief.repeated, mischief.delayed = 0.03, 0.2, 0.3
    found = deployment.learn(api, api)
    for mischief in deployment.mischief:
        mischief.lost = mischief.repeated = mischief.delayed = 0.0
        assert all(mischief.done.values()), "it was a bad network"
    assert [report.seen for report in found] == [report.seen for report in expected]
    assert billed(deployment.data, api) == sent(found)


@pytest.mark.parametrize("api", ["lorry", "tinker"])
def test_connections_that_are_cut_in_the_middle_of_a_message_change_nothing(
    deployment: Deployment, expected: list[Report], api: str
) -> None:
    for cables in deployment.cables:
        cables.cuts_after = (2_000, 6_000)
        deployment.portal.call(cables.cut)
    tenant = f"{api}, cut"
    cut_before = sum(cables.cuts for cables in deployment.cables)
    found = deployment.learn(tenant, api)
    # How often each is cut depends on how many heartbeats a slow machine makes of it.
    assert sum(cables.cuts for cables in deployment.cables) > cut_before, "it was a bad network"
    for cables in deployment.cables:
        cables.cuts_after = None
        deployment.portal.call(cables.cut)
    assert [report.seen for report in found] == [report.seen for report in expected]
    assert billed(deployment.data, tenant) == sent(found)


async def test_connections_that_carry_nothing_any_more_are_given_up(deployment: Deployment) -> None:
    """As behind a firewall that has forgotten them: neither end is told."""
    async with lorry.connect(deployment.address, api_key=deployment.new_key("swallowed")) as service:
        undisturbed = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
        expected = await learn(undisturbed, 4)
        training = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
        losses = await learn(training, 2)
        before = [cables.opened for cables in deployment.cables]
        for cables in deployment.cables:
            deployment.portal.call(cables.swallow)
        assert losses + await learn(training, 2) == expected
    assert all(cables.opened > count for cables, count in zip(deployment.cables, before, strict=True))
