"""Where samples go: to who has computed the beginning of their prompt, or else to the emptiest."""

from hypothesis import given
from hypothesis import strategies as st

from lorry.scheduler.planning.lanes import Command, Lane
from lorry.scheduler.planning.planner import Plan, Planner
from lorry.scheduler.planning.prefixes import Prefixes
from lorry.wire.actor_messages import Capacity
from lorry.wire.ids import ActorId, LaneId, TenantId, future_id

A, B, C = (ActorId(name) for name in "abc")
SAMPLER = LaneId("sampler")


class Desk:
    def __init__(self, *actors: ActorId, rows: int = 8) -> None:
        self.planner = Planner()
        self.where: dict[str, ActorId] = {}
        self.plans: dict[str, Plan] = {}
        self._seq = 0
        for actor in actors:
            self.planner.add_actor(actor, "m", Capacity(4, 100, rows, 64))

    def ask(self, *prefix: str, rows: int = 1, tenant: str = "t") -> ActorId | None:
        """Who gets it, if anybody has room."""
        command = Command(
            future_id(SAMPLER, self._seq), SAMPLER, self._seq, "sample", TenantId(tenant), "m", 10, rows, prefix=prefix
        )
        self._seq += 1
        self.planner.submit(command)
        self.hand_out()
        return self.where.get(command.future)

    def hand_out(self) -> None:
        was_handed_out = True
        while was_handed_out:
            was_handed_out = False
            for actor in self.planner.actors_of("m"):
                while plan := self.planner.next_micro_batch(actor):
                    was_handed_out = True
                    for command in plan.commands:
                        self.where[command.future], self.plans[command.future] = actor, plan

    def end_all(self) -> None:
        for future, plan in self.plans.items():
            for command in plan.commands:
                if command.future == future:
                    self.planner.complete(command.future, plan.batch, 10)
        self.plans.clear()


def test_a_prompt_goes_where_its_beginning_is_known() -> None:
    desk = Desk(A, B, C)
    assert [desk.ask("x"), desk.ask("y"), desk.ask("z")] == [A, B, C]
    desk.end_all()
    assert [desk.ask("z", "z2"), desk.ask("x", "x2"), desk.ask("y", "y2")] == [C, A, B]


def test_what_is_known_nowhere_goes_to_the_emptiest() -> None:
    desk = Desk(A, B, C)
    assert desk.ask("x", rows=3) == A
    assert desk.ask("y", rows=2) == B
    assert [desk.ask(), desk.ask(), desk.ask()] == [C, C, B]


def test_who_knows_a_prompt_and_is_full_is_not_waited_for() -> None:
    desk = Desk(A, B, rows=2)
    assert [desk.ask("x"), desk.ask("x"), desk.ask("x")] == [A, A, B]
    desk.end_all()
    assert desk.ask("x") == A


def test_a_beginning_that_all_share_does_not_gather_all_in_one_place() -> None:
    """A system prompt that is half of each prompt."""
    desk = Desk(A, B, rows=8)
    places = [desk.ask("system", str(i)) for i in range(16)]
    assert (places.count(A), places.count(B)) == (8, 8)
    assert places[4:6] != [A, A], "soon both know it"


def test_of_equals_who_has_nothing_to_train_gets_it() -> None:
    desk = Desk(A, B)
    lane = LaneId("run")
    desk.planner.add_lane(Lane(lane, TenantId("t"), "m"))
    desk.planner.submit(Command(future_id(lane, 0), lane, 0, "forward_backward", TenantId("t"), "m", 10, 0))
    desk.hand_out()
    assert desk.planner.home(lane) == A
    assert desk.ask("x") == B


def test_who_is_gone_knows_nothing_under_its_name_again() -> None:
    desk = Desk(A, B)
    assert desk.ask("x") == A
    desk.end_all()
    desk.planner.actor_lost(A, ())
    desk.planner.add_actor(A, "m", Capacity(4, 100, 8, 64))
    assert desk.ask("x") == B, "the first of two that know nothing of it"


@given(st.lists(st.tuples(st.sampled_from("tuv"), st.lists(st.sampled_from("xyz"), max_size=3), st.integers(1, 4))))
def test_nothing_waits_while_somebody_has_room(asked: list[tuple[str, list[str], int]]) -> None:
    desk = Desk(A, B, C, rows=3)
    for tenant, prefix, rows in asked:
        desk.ask(*prefix, rows=rows, tenant=tenant)
        waits = any(pool.samples.get(TenantId(name)) for pool in desk.planner._pools.values() for name in "tuv")
        assert not (waits and any(actor.sample_rows < 3 for actor in desk.planner._actors.values()))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), max_size=60))
def test_no_more_marks_are_remembered_than_allowed_and_the_first_of_a_prompt_go_last(
    prompts: list[tuple[int, int]],
) -> None:
    prefixes = Prefixes(at_most=10)
    for name, length in prompts:
        marks = [f"{name}/{i}" for i in range(length)]
        prefixes.computed(marks, A)
        assert prefixes.known(marks, A) == 1
        assert prefixes.known([*marks, *("new" for _ in marks)], A) == 0.5
        assert prefixes.known(marks, B) == 0
        assert len(prefixes._holders) <= 10
    prefixes.computed([f"long/{i}" for i in range(20)], A)
    assert prefixes.known([f"long/{i}" for i in range(10)], A) == 1
    assert prefixes.known([f"long/{i}" for i in range(20)], A) == 0.5
