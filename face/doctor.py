"""Whether what the database names is there, and is what was written: files, checkpoints, saved states. It changes
nothing, and may run while the service does."""

import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lorry.actors.adapters.folders import verify
from lorry.storage.blobs import FOLDER, Blobs
from lorry.storage.checkpoints import place_of
from lorry.storage.connection import FILE, may_pass, unusable
from lorry.storage.holding import held
from lorry.storage.looking import looking
from lorry.storage.reports import blobs_named, folders_named, integrity, replays_without_payload
from lorry.storage.store import Store
from lorry.wire.errors import CheckpointError, JournalDamagedError, LorryError

_ADVICE = {
    "newest": "the run will be rebuilt from the state before; nothing is to be done",
    "former": "the next snapshot of the run takes its place; nothing is to be done",
    "both": "while its actor lives, save_state keeps what the run has learned; else make a new run from a checkpoint",
    "checkpoint": "delete the checkpoint, or restore a backup that has it",
    "sampler": "make another sampler",
    "loaded": "while its actor lives, save_state keeps what the run has learned; else make a new run from a checkpoint",
    "queued": "the request will fail when its turn comes: send it again",
    "replayed": "a snapshot of its run makes this needless: it is taken when the run has been idle for a minute",
    "result": "the request took effect; its result cannot be read",
}

_FILE_ADVICE = "stop the service, and restore a backup"


@dataclass(frozen=True, slots=True)
class Finding:
    """`where` is a file or folder below the data, `problem` what is wrong with it, `advice` what to do."""

    where: str
    problem: str
    advice: str


def examine(data: Path) -> list[Finding]:
    """Raises what `looking` raises, but for JournalDamagedError: that is a finding."""
    try:
        with held(data), looking(data) as store:
            if broken := integrity(store):
                return [Finding(FILE, problem, _FILE_ADVICE) for problem in broken]
            return [*_folders(store, data / "checkpoints"), *_files(store, data), *_replays(store)]
    except JournalDamagedError as error:
        return [Finding(FILE, _without_advice(error), _FILE_ADVICE)]
    except sqlite3.DatabaseError as error:
        if may_pass(error):
            raise unusable(data, error) from error
        return [Finding(FILE, str(error), _FILE_ADVICE)]


def _folders(store: Store, root: Path) -> Iterable[Finding]:
    rows = folders_named(store)
    problems = {folder: _problem_of(root, folder) for folder in {row["folder"] for row in rows}}
    damaged = [row for row in rows if problems[row["folder"]]]
    states = [row["what"] for row in damaged if row["role"] in ("newest", "former")]
    for row in damaged:
        folder, role, what = Path(row["folder"]), row["role"], row["what"]
        problem = problems[row["folder"]]
        if role in ("newest", "former"):
            subject = f"the {role} saved state of run {what}"
            advice = _ADVICE["both" if states.count(what) == 2 else role]
        else:
            subject, advice = f"{what}", _ADVICE[role]
        yield Finding("/".join(place_of(folder)), f"{subject}: {problem}", advice)


def _problem_of(root: Path, folder: str) -> str | None:
    try:
        verify(root.joinpath(*place_of(Path(folder))))
    except CheckpointError as error:
        return _without_advice(error)
    return None


def _without_advice(error: LorryError) -> str:
    """An error ends with advice to a client."""
    return str(error).removesuffix(" ".join((type(error).__doc__ or "").split())).rstrip(". ")


def _files(store: Store, data: Path) -> Iterable[Finding]:
    blobs = Blobs(data / FOLDER)
    for row in blobs_named(store):
        try:
            blobs.read(row["file"])
        except JournalDamagedError as error:
            problem = f"request {row['what']}: {_without_advice(error)}"
            yield Finding(f"{FOLDER}/{row['file']}", problem, _ADVICE[row["role"]])


def _replays(store: Store) -> Iterable[Finding]:
    for row in replays_without_payload(store):
        problem = f"run {row['run']} could not be rebuilt: request {row['seq']} is not in the journal"
        yield Finding(FILE, problem, _ADVICE["both"])
