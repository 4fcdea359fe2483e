"""Holds a history against the promises. It sees what was sent, answered and executed, and imports nothing of Lorry."""

from collections import Counter, defaultdict
from collections.abc import Iterator

from .history import Event, Finding, History
from .numbers import measured, mixed
from .reference import NAMES_AT_FAULT, Facts, Reference

NEWEST_KEPT = 2
"""Of the weights without a name, as the broker of a history is told."""
USD_PER_MILLION = {"prefill": 3.0, "cached_prefill": 0.5, "sample": 7.0, "train": 11.0}
NEVER_REPLAYED = {"forward", "sample", "save_state", "save_weights_for_sampler"}
TRAINING = {"forward", "forward_backward", "optim_step", "save_state", "load_state", "save_weights_for_sampler"}

_LATE = "DeadlineExceededError"


class Checker:
    def __init__(self, history: History) -> None:
        self._events = history.events
        self._owner: dict[str, str] = {}
        self._sent: dict[int, Event] = {}
        self._answers: dict[int, Event] = {}
        self._outcomes: dict[str, tuple[str | None, str]] = {}
        self._accepted: dict[str, dict[int, list[Facts]]] = defaultdict(lambda: defaultdict(list))
        self._references: dict[str, Reference] = {}
        self._cancelled: set[str] = set()
        self._deleted = {event.facts["path"] for event in self._of("deletes")}

    def findings(self) -> Iterator[Finding]:
        yield from self._alive()
        yield from self._told()
        for event in self._of("cancels"):
            self._cancelled.add(event.facts["future"])
        yield from self._streamed()
        yield from self._answered()
        yield from self._executed()
        for event in self._of("run"):
            yield from self._run(event.facts["lane"], event.facts["seed"])
        for event in self._of("sampler"):
            yield from self._sampler(event)
        yield from self._usage()
        yield from self._numbers()

    def _of(self, *whats: str) -> list[Event]:
        return [event for event in self._events if event.what in whats]

    # The service -----------------------------------------------------------------------------------------------------

    def _alive(self) -> Iterator[Finding]:
        for event in self._of("broke", "never ends"):
            yield Finding("alive", event.facts.get("trace") or event.facts["why"])

    # What clients were told ------------------------------------------------------------------------------------------

    def _told(self) -> Iterator[Finding]:
        """A result is its owner's alone, and the same whenever it is told."""
        for event in self._of("run", "sampler"):
            self._owner[event.facts["lane"]] = event.facts["tenant"]
        for event in self._of("resolved"):
            future, tenant = event.facts["future"], event.facts["tenant"]
            outcome = event.facts["code"], event.facts["result"]
            if self._owner.get(future.rpartition(":")[0], tenant) != tenant:
                if outcome[0] != "NotFoundError":
                    yield Finding("privacy", f"{tenant} was told of {future}")
            elif self._outcomes.setdefault(future, outcome) != outcome:
                yield Finding("same result", f"{future} was {self._outcomes[future]}, and then {outcome}")

    def _streamed(self) -> Iterator[Finding]:
        """What a client has read of a sample is how the sample begins that it gets, and nobody else's: an actor goes on
        where another was lost. A broker that starts anew has forgotten what was read."""
        read: dict[str, list[int]] = {}
        made: dict[str, list[list[int]]] = defaultdict(list)
        for event in self._of("broker up", "streams", "streamed", "reads", "diverges"):
            if event.what == "broker up":
                read.clear()
                continue
            future, tokens = event.facts["future"], event.facts.get("tokens", [])
            if event.what == "streams":
                made[future].append(tokens)
            elif event.what == "streamed":
                if tokens[: len(read.get(future, []))] != read.get(future, []):
                    yield Finding("streaming", f"{read[future]} was read of {future}, which became {tokens}")
            elif event.what == "diverges":
                if future in read:
                    yield Finding("streaming", f"{future} has other tokens than were told under the same broker")
            else:
                tenant = event.facts["tenant"]
                if self._owner.get(future.rpartition(":")[0], tenant) != tenant:
                    yield Finding("privacy", f"{tenant} read {future}")
                if tokens not in made[future]:
                    yield Finding("streaming", f"{tokens} was read of {future}, and never made")
                read[future] = max(tokens, read.get(future, []), key=len)

    def _answered(self) -> Iterator[Finding]:
        """One request for each seq is acknowledged, and all that was is over."""
        for event in self._of("answered"):
            self._answers[event.facts["request"]] = event
        for event in self._of("intrudes"):
            answer = self._answers.get(event.facts["request"])
            if answer is not None and answer.facts["code"] != "NotFoundError":
                yield Finding("privacy", f"{event.facts['tenant']} got at {event.facts['lane']}")
        for event in self._of("sent"):
            number, facts = event.facts["request"], event.facts
            self._sent[number] = event
            answer = self._answers.get(number)
            if answer is None:
                yield Finding("answered", f"request {number} of {facts['tenant']} was never answered")
            elif answer.facts["code"] is None:
                self._accepted[facts["lane"]][facts["seq"]].append(facts)
            elif answer.facts["code"] != "SeqConflictError":
                yield Finding("answered", f"request {number} was answered with {answer.facts['code']}")
        for lane, seqs in self._accepted.items():
            for seq, some in seqs.items():
                if len({_content(facts) for facts in some}) > 1:
                    yield Finding("conflict", f"two requests were accepted as {lane}:{seq}")
                if f"{lane}:{seq}" not in self._outcomes:
                    yield Finding("resolved", f"{lane}:{seq} was accepted, and never resolved")
        for number, event in self._sent.items():
            answer, seq = self._answers.get(number), event.facts["seq"]
            accepted = self._accepted[event.facts["lane"]].get(seq, [])
            if answer and answer.facts["code"] and _content(event.facts) in map(_content, accepted):
                yield Finding("conflict", f"request {number} is the one under its seq, and was refused")
        audited = {event.facts["tenant"] for event in self._of("audited")}
        for tenant in {event.facts["tenant"] for event in self._of("sent")} - audited:
            yield Finding("resolved", f"{tenant} waits for ever")

    # What actors did -------------------------------------------------------------------------------------------------

    def _executed(self) -> Iterator[Finding]:
        """On any one state each command at most once, and in order. What no replay needs is over once it was told."""
        told: set[str] = set()
        for event in self._of("resolved", "handed"):
            if event.what == "resolved":
                if self._owner.get(event.facts["future"].rpartition(":")[0]) == event.facts["tenant"]:
                    told.add(event.facts["future"])
                continue
            for future in told.intersection(event.facts["futures"]):
                lane, _, seq = future.rpartition(":")
                if {facts["kind"] for facts in self._accepted[lane][int(seq)]} <= NEVER_REPLAYED:
                    yield Finding("exactly once", f"{future} was handed out after its result had been told")
        for event in self._of("executed"):
            facts = event.facts
            if facts["seq"] <= facts["before"]:
                yield Finding("order", f"{facts['run']}:{facts['seq']} ran after {facts['before']} had")

    # What came of it -------------------------------------------------------------------------------------------------

    def _run(self, lane: str, seed: int) -> Iterator[Finding]:
        reference = self._references[lane] = Reference(lane, seed)
        for seq, some in sorted(self._accepted[lane].items()):
            code, result = self._outcomes.get(f"{lane}:{seq}", (None, ""))
            if f"{lane}:{seq}" not in self._outcomes:
                return
            if code is not None and (problem := self._unjustified(some[0], code)):
                yield Finding("failed", f"{some[0]['kind']} {lane}:{seq} failed with {code}{problem}")
            if code is None and some[0]["refusal"]:
                yield Finding("failed", f"{lane}:{seq} was refused, and succeeded")
            if found := reference.apply(some[0], code, result, self._least(some, reference)):
                yield found
                return

    def _unjustified(self, command: Facts, code: str) -> str | None:
        """What is wrong with this failure; None where it had to be, or might be."""
        future = f"{command['lane']}:{command['seq']}"
        flaw = command["payload"].decode().rpartition("|")[2]
        if command["refusal"]:
            return None if code == command["refusal"] else f", not {command['refusal']}"
        if code == "CommandCancelledError":
            return None if future in self._cancelled else ", which nobody asked for"
        if code == _LATE:
            return self._in_time(command, future)
        expected = {"nan": "NonFiniteError", "bad": "InvalidRequestError", "poison": "ActorKilledError"}.get(flaw)
        if command["kind"] not in TRAINING and code == "InvalidRequestError":
            return None
        if command["kind"] not in TRAINING and code == "NotFoundError":
            return self._outlived(command["lane"], future)
        if command["name"] in NAMES_AT_FAULT:
            expected = "InvalidRequestError"
        if command["kind"] == "load_state":
            return self._load_failed(command, code)
        return None if code == expected else f", expected {expected or 'success'}"

    def _in_time(self, command: Facts, future: str) -> str | None:
        """Nobody's time is up before it is."""
        if command["timeout_s"] is None:
            return ", which has none"
        sent = min(event.at for event in self._of("sent") if event.facts["payload"] == command["payload"])
        told = min(e.at for e in self._of("resolved") if e.facts["future"] == future and e.facts["code"] == _LATE)
        return None if told >= sent + command["timeout_s"] else f" after {told - sent:.3f} of {command['timeout_s']} s"

    def _outlived(self, sampler: str, future: str) -> str | None:
        """Weights without a name may be gone once their run has saved enough that are newer; by then, not later."""
        path = next(event.facts["path"] for event in self._of("sampler") if event.facts["lane"] == sampler)
        run, _, name = (path or "").removeprefix("tinker://").rpartition("/sampler_weights/")
        if not name.startswith("_"):
            return f", though {path} has a name"
        owner = self._owner[sampler]
        told = next(e.at for e in self._of("resolved") if e.facts["future"] == future and e.facts["tenant"] == owner)
        newer = {
            event.facts["seq"]
            for event in self._of("executed")
            if event.facts["run"] == run
            and event.facts["seq"] > int(name[1:])
            and event.at <= told
            and event.facts["kind"] == "save_weights_for_sampler"
            and self._accepted[run][event.facts["seq"]][0]["name"] is None
            and self._outcomes.get(f"{run}:{event.facts['seq']}", ("",))[0] is None
        }
        return None if len(newer) >= NEWEST_KEPT else f", though {len(newer)} are newer than {path}"

    def _load_failed(self, command: Facts, code: str) -> str | None:
        """What it was to load had not been saved when it came, or never was."""
        saves = self._saves_before(command)
        if code == "NotFoundError" and command["path"] in self._deleted:
            return None
        if code == "NotFoundError":
            known = [seq for seq, facts in saves.items() if self._was_done_before(facts, command)]
            return f": {max(known)} had saved it" if known else None
        failed = any(self._outcomes.get(f"{command['lane']}:{seq}", ("",))[0] is not None for seq in saves)
        return None if code == "CheckpointError" and failed else ", expected a state"

    def _saves_before(self, load: Facts) -> dict[int, Facts]:
        name = (load["path"] or "").rpartition("/")[2]
        accepted = self._accepted[load["lane"]].items()
        return {
            seq: some[0]
            for seq, some in accepted
            if seq < load["seq"] and some[0]["kind"] == "save_state" and some[0]["name"] == name
        }

    def _was_done_before(self, save: Facts, load: Facts) -> bool:
        """Known to have been done when the load was sent for the first time."""
        future = f"{save['lane']}:{save['seq']}"
        first = min(self._sent[facts["request"]].at for facts in self._accepted[load["lane"]][load["seq"]])
        told = [e.at for e in self._of("resolved") if e.facts["future"] == future and e.facts["code"] is None]
        return bool(told) and min(told) < first

    def _least(self, some: list[Facts], reference: Reference) -> int:
        if some[0]["kind"] != "load_state":
            return -1
        saves = self._saves_before(some[0])
        return max((seq for seq, save in saves.items() if self._was_done_before(save, some[0])), default=-1)

    def _sampler(self, made: Event) -> Iterator[Finding]:
        """All its samples are of the same weights, which a save under its name wrote."""
        lane, path = made.facts["lane"], made.facts["path"]
        possible = {"base"}
        if path is not None:
            run, _, name = path.removeprefix("tinker://").split("/")
            reference = self._references.get(run)
            saves = reference.saved.sampler.get(name, {}) if reference else {}
            possible = {weights for some in saves.values() for weights in some}
        for seq, some in sorted(self._accepted[lane].items()):
            code, result = self._outcomes.get(f"{lane}:{seq}", ("", ""))
            if code is not None:
                if code and (problem := self._unjustified(some[0], code)):
                    yield Finding("failed", f"sample {lane}:{seq} failed with {code}{problem}")
                continue
            uid = some[0]["payload"].decode().partition("|")[0]
            possible = {weights for weights in possible if mixed("sample", weights, uid) == result}
            if not possible:
                yield Finding("result", f"sample {lane}:{seq} gave {result}, which is nothing that {path} has been")
                return

    def _usage(self) -> Iterator[Finding]:
        """To the token, and to the last digit of its cost: each command that succeeded counts once, for its run and its
        tenant."""
        expected: Counter[tuple[str, str, str]] = Counter()
        runs = {
            e.facts["lane"]: (e.facts["path"] or "").removeprefix("tinker://").partition("/")[0]
            for e in self._of("sampler")
        }
        for lane, seqs in self._accepted.items():
            for seq, some in seqs.items():
                if self._outcomes.get(f"{lane}:{seq}", ("",))[0] is None:
                    for kind, tokens in _counted(some[0]):
                        expected[some[0]["tenant"], runs.get(lane, lane), kind] += tokens
        billed: Counter[tuple[str, str, str]] = Counter()
        for event in self._of("usage"):
            billed[event.facts["tenant"], event.facts["run"], event.facts["kind"]] += event.facts["tokens"]
            kind, tokens, cost = (event.facts[name] for name in ("kind", "tokens", "cost"))
            if cost != tokens * round(USD_PER_MILLION[kind] * 1e6):  # in millionths of a micro-dollar
                yield Finding("money", f"{tokens} tokens of {kind} cost {cost}")
            if event.facts["owner"] != event.facts["tenant"]:
                yield Finding("privacy", f"usage of {event.facts['owner']} shown to {event.facts['tenant']}")
        for event in self._of("bill"):  # computed again from the journal, and storage from the checkpoints
            yield Finding("money", event.facts["finding"])
        audited = {event.facts["tenant"] for event in self._of("audited")}
        for key in sorted(expected.keys() | billed.keys()):
            if expected[key] != billed[key] and key[0] in audited:
                yield Finding("usage", f"{' '.join(key)}: {billed[key]} tokens billed, {expected[key]} used")

    def _numbers(self) -> Iterator[Finding]:
        """What is kept of a run's steps is what its results were, each once, whatever was tried again or replayed."""
        for event in self._of("numbers"):
            run, kept = event.facts["run"], {step: values for _, step, values in event.facts["points"]}
            expected: dict[int, dict[str, float]] = defaultdict(dict)
            step = 0
            for seq, some in sorted(self._accepted[run].items()):
                code, result = self._outcomes.get(f"{run}:{seq}", ("unknown", ""))
                if code == "unknown":
                    break
                if code is None and some[0]["kind"] == "forward_backward":
                    before = expected[step].get("gradient:sum", 0.0)
                    expected[step]["gradient:sum"] = before + measured(result)
                    tokens = sum(count for _, count in _counted(some[0]))
                    expected[step]["tokens:sum"] = expected[step].get("tokens:sum", 0.0) + tokens
                elif code is None and some[0]["kind"] == "optim_step":
                    expected[step]["step"] = measured(result)
                    step += 1
            else:
                if kept != expected:
                    yield Finding("numbers", f"{run} keeps {kept}, its results were {dict(expected)}")


def _content(facts: Facts) -> tuple[object, ...]:
    if facts["refusal"]:
        return (facts["kind"], facts["refusal"])
    return facts["kind"], facts["name"], facts["path"], facts["payload"]


def _counted(facts: Facts) -> list[tuple[str, int]]:
    """What an actor counts of a command."""
    tokens = int(facts["payload"].decode().split("|")[1]) if facts["payload"] else 0
    if facts["kind"] == "forward_backward":
        return [("train", tokens)]
    if facts["kind"] == "forward":
        return [("prefill", tokens)]
    return [("prefill", 2), ("cached_prefill", 1), ("sample", tokens)] if facts["kind"] == "sample" else []
