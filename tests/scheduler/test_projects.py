"""Projects: made by use, moved with their session, remembered, limited, and nobody else's."""

from pathlib import Path

import pytest

import lorry
from lorry.client.connection import open_connection
from lorry.client.operator import administer
from lorry.scheduler import projects
from lorry.wire.admin_messages import SetLimits
from lorry.wire.catalogue_messages import AssignProject, ClientSessionCreated, CreateClientSession, FindRuns, Slot
from lorry.wire.client_messages import CreateRun, CreateSampler, RunCreated, SamplerCreated
from lorry.wire.errors import InvalidRequestError, LimitReachedError, NotFoundError
from lorry.wire.ids import ProjectId, TenantId
from lorry.wire.limits import Limits
from lorry.wire.types import LoraConfig, SaveWeightsForSamplerResponse, TrainingRun

from .test_client_door import DATUM, Serving

BIRDS, OWLS = ProjectId("birds"), ProjectId("owls")
LORA = LoraConfig(rank=4, seed=0)


async def test_what_is_made_is_in_its_clients_project_and_found_there(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service:
        service.may_work.set()
        async with (
            lorry.connect(service.address, api_key=service.key, project="birds") as birds,
            lorry.connect(service.address, api_key=service.key) as plain,
        ):
            metadata = {"arm": "a", "seed": "1"}
            mine = await birds.create_lora_training_client_async("m", rank=4, user_metadata=metadata)
            other = await plain.create_lora_training_client_async("m", rank=4, user_metadata={"arm": "a"})
            await mine.forward_backward([DATUM], "cross_entropy")
            saved: SaveWeightsForSamplerResponse = await mine.save_weights_for_sampler("out")
            await plain.create_sampling_client_async(model_path=saved.path)
            rest = plain.create_rest_client()
            found = await rest.list_training_runs_async(project="birds")
            assert [(run.training_run_id, run.project) for run in found] == [(mine.model_id, "birds")]
            by_metadata = [
                [run.training_run_id for run in await rest.list_training_runs_async(user_metadata=wanted)]
                for wanted in ({"arm": "a"}, metadata, {"arm": "a", "seed": "2"})
            ]
            assert by_metadata == [[mine.model_id, other.model_id], [mine.model_id], []]
            assert await rest.list_training_runs_async(base_model="n") == []
            listed = [(p.name, p.training_runs) for p in await rest.list_projects_async()]
            assert listed == [("default", 1), ("birds", 1)]
        samplers = service.store.rows("SELECT project FROM samplers")
        assert samplers == [{"project": "birds"}], "what samples a run's weights is where the run is"
        asked = service.store.rows("SELECT DISTINCT project FROM commands")
        assert asked == [{"project": "birds"}]


async def test_a_session_moves_with_all_that_was_made_in_it_and_stays_there_after_a_restart(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service, open_connection(service.address, service.key) as alice:
        key = service.key
        create = CreateClientSession(alice.next_request(), "test", project=BIRDS)
        session = (await alice.ask(create, ClientSessionCreated)).session
        made = CreateRun(alice.next_request(), "", "m", LORA, slot=Slot(session, 0))
        run = (await alice.ask(made, RunCreated)).run
        sampled = CreateSampler(alice.next_request(), "", base_model="m", slot=Slot(session, 1))
        sampler = (await alice.ask(sampled, SamplerCreated)).sampler
        elsewhere = CreateRun(alice.next_request(), "", "m", LORA, slot=Slot(session, 2), project=OWLS)
        with pytest.raises(InvalidRequestError, match=r"project is 'owls', expected 'birds', which its client session"):
            await alice.ask(elsewhere, RunCreated)
        await alice.tell(AssignProject(alice.next_request(), session, OWLS))
        assert await projects_of(alice) == {run: "owls"}
        assert service.store.rows("SELECT project FROM samplers WHERE id = ?", sampler) == [{"project": "owls"}]
        with pytest.raises(NotFoundError, match="there is no client session 'session-0'"):
            await alice.tell(AssignProject(alice.next_request(), "session-0", ProjectId("never")))
        (told,) = (event for event in service.store.audit() if event.event == "session_project_set")
        assert (told.subject, told.detail) == (session, {"project": "owls", "before": "birds"})
    async with Serving(tmp_path) as again, open_connection(again.address, key) as alice:
        assert await projects_of(alice) == {run: "owls"}
        made = [event.subject for event in again.store.audit() if event.event == "project_created"]
        assert made == ["birds", "owls"], "and no other, for what was refused"


async def projects_of(connection: lorry.client.connection.Connection) -> dict[str, str]:
    runs = await connection.ask(FindRuns(connection.next_request()), list[TrainingRun])
    return {run.training_run_id: run.project for run in runs}


async def test_names_are_checked_and_no_tenant_makes_any_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projects, "MAX_PROJECTS", 1)
    async with Serving(tmp_path) as service, open_connection(service.address, service.key) as alice:
        for name in ("", "a/b", "..", "x" * 129, "käse"):
            with pytest.raises(InvalidRequestError, match="project is"):
                made = CreateClientSession(alice.next_request(), "test", project=ProjectId(name))
                await alice.ask(made, ClientSessionCreated)
        for name in ("one", "one", "default"):
            await alice.ask(
                CreateClientSession(alice.next_request(), "t", project=ProjectId(name)), ClientSessionCreated
            )
        with pytest.raises(LimitReachedError, match="project is 'two', and alice has 1 already"):
            await alice.ask(CreateRun(alice.next_request(), "", "m", LORA, project=ProjectId("two")), RunCreated)
        async with open_connection(service.address, service.store.create_key(TenantId("bob"), 1.0)) as bob:
            await bob.ask(CreateRun(bob.next_request(), "", "m", LORA, project=ProjectId("two")), RunCreated)


async def test_a_projects_limits_are_for_that_project_alone(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service:
        service.may_work.set()
        config = service.config
        for holder, wrong in (("project:alice/a b", "project is 'a b'"), ("project:eve/x", "there is no tenant 'eve'")):
            with pytest.raises((InvalidRequestError, NotFoundError), match=wrong):
                await administer(service.address, None, config.operator_key, SetLimits(holder, Limits(rank=2)))
        limit = SetLimits("project:alice/birds", Limits(rank=2, runs=1))
        await administer(service.address, None, config.operator_key, limit)
        async with (
            lorry.connect(service.address, api_key=service.key, project="birds") as birds,
            lorry.connect(service.address, api_key=service.key, project="owls") as owls,
        ):
            with pytest.raises(LimitReachedError, match="rank is 4, the limit of project:alice/birds is 2"):
                await birds.create_lora_training_client_async("m", rank=4)
            await birds.create_lora_training_client_async("m", rank=2)
            with pytest.raises(LimitReachedError, match="runs is 1, the limit of project:alice/birds is 1"):
                await birds.create_lora_training_client_async("m", rank=2)
            for _ in range(2):
                await owls.create_lora_training_client_async("m", rank=4)
