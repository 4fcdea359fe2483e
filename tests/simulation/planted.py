"""Ways to break the code, each a text that is replaced in one file. The simulation has to find every one."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fault:
    name: str
    file: str
    right: str
    wrong: str


ACCEPTING, FINISHING, COMMANDS = "scheduler/accepting.py", "scheduler/finishing.py", "scheduler/commands.py"
LANES, PLANNER, LEDGER = (f"scheduler/planning/{name}.py" for name in ("lanes", "planner", "ledger"))
RECOVERING, SPREADING = "scheduler/recovering.py", "scheduler/planning/spreading.py"
JOURNAL, LINKS = "storage/journal.py", "wire/sequenced.py"
STORE, POINTS, REGISTRY = "storage/store.py", "scheduler/restore_points.py", "scheduler/registry.py"
SNAPSHOTS, WRITER, STATES = "scheduler/snapshotting.py", "storage/writer.py", "tests/simulation/states.py"
PRICES, DEADLINES = "scheduler/planning/prices.py", "scheduler/planning/deadlines.py"
ACTOR_DOOR, OUTBOX = "scheduler/actor_door.py", "actors/outbox.py"

CONTROL = Fault(
    "none: the code as it is",
    WRITER,
    "        self._thread = anyio.CapacityLimiter(1)\n",
    "        self._thread = anyio.CapacityLimiter(1)\n",
)
"""In the histories in which the faults are looked for, nothing may be found without them."""

FAULTS = (
    Fault(
        "a command is acknowledged before it is journalled",
        ACCEPTING,
        "        self._writer.write(journal, done, len(content))\n",
        "        request.answer(None)\n        self._writer.write(journal, done, len(content))\n",
    ),
    Fault(
        "a result is told before it is journalled",
        FINISHING,
        '        self._writer.write(journal, done, len(result.payload or b""))\n',
        "        self.tell(self._waiters._open.get(row.future, ()), row.future, result.error, result.payload)\n"
        '        self._writer.write(journal, done, len(result.payload or b""))\n',
    ),
    Fault(
        "a replay is billed",
        COMMANDS,
        "            self.recovering.replayed(command, outcome)\n",
        "            twice = 'UPDATE usage SET tokens = 2 * tokens WHERE future = ?'\n"
        "            self.finishing._writer.write(\n"
        "                lambda store: store._db.execute(twice, [command.future]) and None\n"
        "            )\n"
        "            self.recovering.replayed(command, outcome)\n",
    ),
    Fault(
        "a replay's numbers are written again",
        COMMANDS,
        "            self.recovering.replayed(command, outcome)\n",
        "            again = self.metrics.of_training(self._open.replays[command.future], outcome)\n"
        "            self._writer.write(lambda store: again(store, 0.0) and None)\n"
        "            self.recovering.replayed(command, outcome)\n",
    ),
    Fault(
        "a run's steps are counted anew after a start",
        "scheduler/broker.py",
        "            store.all_actors_ended(time.time())\n",
        "            store.all_actors_ended(time.time())\n            store._db.execute('UPDATE runs SET steps = 0')\n",
    ),
    Fault("tokens cost twice as much", PRICES, "    return tokens * price\n", "    return 2 * tokens * price\n"),
    Fault("a step's payload is dropped with its result", FINISHING, "row.kind in REPLAYED_KINDS", "row.kind == 'fb'"),
    Fault("the digest of a resend is ignored", ACCEPTING, "used.digest in (None, digest)", "True"),
    Fault(
        "what is over is taken to be one stretch after a start",
        ACCEPTING,
        "if top == run.first_seq + count - 1:",
        "if count:",
    ),
    Fault(
        "a refused seq is not passed over",
        ACCEPTING,
        "self._planner.skip(row.lane, row.seq)\n        self._finishing.tell",
        "self._finishing.tell",
    ),
    Fault(
        "a run that loses its state forgets what it skipped",
        LANES,
        "        self._replay.clear()\n        if self.spread",
        "        self._replay.clear()\n        self._skipped.clear()\n        if self.spread",
    ),
    Fault("a cancelled command leaves a gap", LANES, "        self.skip((seq,))\n", ""),
    Fault(
        "what a dead actor held is forgotten",
        LANES,
        "            if not command.replay and command.share is None:\n",
        "            if False:\n",
    ),
    Fault(
        "an outcome of an earlier batch counts",
        LEDGER,
        "future in self._in_flight and self._in_flight[future].batch == batch",
        "future in self._in_flight",
    ),
    Fault(
        "an actor's death is not held against what it had",
        LEDGER,
        "= max(self._attempts.get(blamed.future, 0), deaths + 1)\n",
        "= 0\n",
    ),
    Fault(
        "a suspect has company at its last attempt",
        PLANNER,
        "== MAX_ATTEMPTS - 1",
        "== MAX_ATTEMPTS",
    ),
    Fault("a replay repeats what failed", JOURNAL, "AND state IN ('done', 'discarded')", "AND state != 'queued'"),
    Fault(
        "a replay leaves out loads",
        JOURNAL,
        "kind IN ('forward_backward', 'optim_step', 'load_state')",
        "kind IN ('forward_backward', 'optim_step')",
    ),
    Fault(
        "a dropped gradient is not recorded", FINISHING, '"discarded" if outcome.discarded else "failed"', '"failed"'
    ),
    Fault(
        "a replay computes the step that dropped its gradient",
        COMMANDS,
        'discard=row.state == "discarded"',
        "discard=False",
    ),
    Fault(
        "a replay is read before what was completed is written",
        RECOVERING,
        "        self._writer.write(read, done)\n",
        "        done(read(self._writer._store))\n",
    ),
    Fault(
        "a run with work is not rebuilt when its actor dies",
        RECOVERING,
        "            if self._planner.queued(lane):\n",
        "            if False:\n",
    ),
    Fault(
        "payloads go with the newest saved state",
        JOURNAL,
        "run.id, run.former_seq, before",
        "run.id, run.restore_seq, before",
    ),
    Fault(
        "falling back forgets the older seq",
        POINTS,
        "restore_folder=run.former_folder, restore_seq=run.former_seq",
        "restore_folder=run.former_folder",
    ),
    Fault("a saved state that comes late counts", POINTS, "    if seq <= run.restore_seq:\n        return run\n", ""),
    Fault(
        "a snapshot is said to cover one more",
        SNAPSHOTS,
        "moved_on(run, message.folder, message.seq,",
        "moved_on(run, message.folder, message.seq + 1,",
    ),
    Fault("the older saved state is swept", STORE, " UNION ALL SELECT former_folder FROM runs", ""),
    Fault("the newest saved state is swept", STORE, " UNION ALL SELECT restore_folder FROM runs", ""),
    Fault(
        "what a replay would load is swept",
        STORE,
        "OR commands.kind = 'load_state' AND commands.state = 'done'",
        "OR 0",
    ),
    Fault(
        "weights without a name go one save early",
        STORE,
        "LIMIT 1 OFFSET :newest - 1)",
        "LIMIT 1 OFFSET :newest - 2)",
    ),
    Fault(
        "what comes behind a save that is being written is told before it",
        OUTBOX,
        "        if run not in self._kept:\n            return False\n        self._kept[run].append(_Kept(told))\n",
        "        if run not in self._kept or isinstance(told, End):\n            return False\n"
        "        self._kept[run].append(_Kept(told))\n",
    ),
    Fault(
        "a snapshot is told before what it covers",
        OUTBOX,
        "        if run not in self._kept:\n            return False\n        self._kept[run].append(_Kept(told))\n",
        "        if run not in self._kept or not isinstance(told, End):\n            return False\n"
        "        self._kept[run].append(_Kept(told))\n",
    ),
    Fault(
        "a run that was taken back meanwhile is handed out",
        ACTOR_DOOR,
        "for each in found if self._planner.is_in_flight(each[0].future, plan.batch)]",
        "for each in found]",
    ),
    Fault(
        "a tenant sees another's runs",
        REGISTRY,
        'if row is None or row.tenant != tenant:\n            raise NotFoundError(f"there is no run or sampler',
        'if row is None:\n            raise NotFoundError(f"there is no run or sampler',
    ),
    Fault(
        "a file goes before the commit that drops it",
        JOURNAL,
        """        self._unnamed += [row["payload_file"] for row in rows]
        self._db.execute(f"UPDATE""",
        """        self._blobs.delete([row["payload_file"] for row in rows])
        self._db.execute(f"UPDATE""",
    ),
    Fault(
        "a sweep takes the files of results",
        JOURNAL,
        '" UNION ALL SELECT payload_file FROM results WHERE payload_file IS NOT NULL"',
        '""',
    ),
    Fault(
        "what was lost on the way is not sent again",
        LINKS,
        "for number, missed in self._unconfirmed:",
        "for number, missed in ():",
    ),
    Fault(
        "what came twice is read twice",
        LINKS,
        "        if number <= self._received:\n            return []\n",
        "        if number <= self._received:\n            return [frames]\n",
    ),
    Fault(
        "a part whose actor died is forgotten",
        LEDGER,
        "                pool.parts.appendleft(command)\n",
        "                pass\n",
    ),
    Fault(
        "parts are computed with the weights of an earlier step",
        LANES,
        "        if command.kind in CHANGES_WEIGHTS:\n            self.weights = None\n",
        "",
    ),
    Fault(
        "a command is gathered before all of its parts are done",
        SPREADING,
        "return None if self.left or self.is_gathering",
        "return None if len(self.left) > 1 or self.is_gathering",
    ),
    Fault(
        "what could not be spread is not executed",
        LANES,
        "        self._put_back(replace(self.spread.whole, may_spread=False))\n",
        "",
    ),
    Fault(
        "a share of a command ends it",
        COMMANDS,
        "elif command.share is not None:",
        'elif command.share is not None and command.share.stage != "gather":',
    ),
    Fault(
        "a run that loses its state loses what was spread",
        LANES,
        "            self._put_back(self.spread.whole)\n",
        "",
    ),
    Fault(
        "what is kept no longer is billed on",
        STORE,
        "        if self.rows(gone, checkpoint.path, checkpoint.folder):\n",
        "        if not self.rows(gone, checkpoint.path, checkpoint.folder):\n",
    ),
    Fault("a deadline comes before its time", DEADLINES, "at <= now:", "at <= now + 5:"),
    Fault("a snapshot is without its pending gradient", STATES, "asdict(self)", "asdict(replace(self, pending=()))"),
    Fault(
        "an actor begins anew what another was lost with, though a client has read of it",
        COMMANDS,
        "if not (made := self._open.streams.so_far(item.future)):\n",
        "made = list[bytes]()\n        if not made:\n",
    ),
    Fault(
        "what was made of a sample is told a connection once, and not again when it asks",
        "scheduler/client_results.py",
        "            if made := [(future, each) for each in self._commands.made_so_far(future)]:\n",
        "            if made := []:\n",
    ),
)
