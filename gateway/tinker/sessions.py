"""Client sessions: opened by a ServiceClient, kept by its heartbeats, found again by its owner."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from fastapi.responses import Response
from pydantic import BaseModel
from tinker.types import (
    CreateSessionRequest,
    CreateSessionResponse,
    GetSessionResponse,
    ListSessionsResponse,
    SessionHeartbeatRequest,
    SessionHeartbeatResponse,
    SessionSearchRequest,
    SessionSearchResponse,
)
from tinker.types.session_search_cursor import SessionSearchCursor
from tinker.types.session_status import (
    ClientSessionFinished,
    ClientSessionFinishErrored,
    ClientSessionFinishInterrupted,
    ClientSessionFinishSuccess,
    SessionActive,
    SessionStatus,
)
from tinker.types.session_summary import SessionSummary

from ...wire.catalogue_messages import (
    AssignProject,
    ClientSessionCreated,
    CreateClientSession,
    FinishClientSession,
    TouchClientSession,
)
from ...wire.errors import NotFoundError
from ...wire.ids import ProjectId
from ...wire.types import Checkpoint, ClientSession, Project
from ..bodies import body_of
from ..broker import Broker, BrokerOf
from .moments import moment

router = APIRouter()


class _Reason(BaseModel):
    type: Literal["success", "errored", "interrupted"]


class _Project(BaseModel):
    """The SDK sends this from a plain dict; it has no type of it."""

    project_id: str


class _Finish(BaseModel):
    """The SDK sends this from a plain dict; it has no type of it."""

    reason: _Reason
    detail: str | None = None


def project_of(body: object, field: str = "project_id") -> ProjectId | None:
    """What a newer SDK says of where something goes; an older one, or nobody, says nothing."""
    said = getattr(body, field, None)
    return ProjectId(said) if said else None


async def check_projects(broker: Broker, names: list[str]) -> None:
    """Raises NotFoundError for one that the tenant does not have."""
    known = {project.name for project in await broker.look("projects", list[Project])}
    for name in names:
        if name not in known:
            raise NotFoundError(f"there is no project {name!r}", field="project_id")


def plain_strings(metadata: dict[str, Any] | None) -> dict[str, str]:
    return {key: str(value) for key, value in (metadata or {}).items()}


@router.post("/create_session")
async def create_session(
    broker: BrokerOf, body: Annotated[CreateSessionRequest, Depends(body_of(CreateSessionRequest))]
) -> CreateSessionResponse:
    created = await broker.ask(
        lambda number: CreateClientSession(
            number,
            f"tinker {body.sdk_version}",
            body.tags,
            plain_strings(body.user_metadata),
            body.display_name,
            project_of(body),
        ),
        ClientSessionCreated,
    )
    return CreateSessionResponse(session_id=created.session)


@router.post("/session_heartbeat")
async def session_heartbeat(
    broker: BrokerOf, body: Annotated[SessionHeartbeatRequest, Depends(body_of(SessionHeartbeatRequest))]
) -> SessionHeartbeatResponse:
    """410 for a session that its client has finished: the SDK stops its heartbeats then."""
    await broker.tell(lambda number: TouchClientSession(number, body.session_id))
    return SessionHeartbeatResponse()


@router.post("/sessions/{session_id}/finish", status_code=204)
async def finish_session(
    broker: BrokerOf, session_id: str, body: Annotated[_Finish, Depends(body_of(_Finish))]
) -> Response:
    await broker.tell(lambda number: FinishClientSession(number, session_id, body.reason.type, body.detail))
    return Response(status_code=204)


@router.put("/sessions/{session_id}/project", status_code=204)
async def assign_session_project(
    broker: BrokerOf, session_id: str, body: Annotated[_Project, Depends(body_of(_Project))]
) -> Response:
    project = ProjectId(body.project_id)
    await broker.tell(lambda number: AssignProject(number, session_id, project))
    return Response(status_code=204)


async def _sessions(broker: Broker) -> list[ClientSession]:
    return await broker.look("sessions", list[ClientSession])


@router.get("/sessions")
async def list_sessions(broker: BrokerOf, limit: int = 20, offset: int = 0) -> ListSessionsResponse:
    found = await _sessions(broker)
    return ListSessionsResponse(sessions=[session.session_id for session in found[offset : offset + limit]])


@router.get("/sessions/{session_id}")
async def get_session(broker: BrokerOf, session_id: str) -> GetSessionResponse:
    for session in await _sessions(broker):
        if session.session_id == session_id:
            return GetSessionResponse(
                training_run_ids=session.training_run_ids,
                sampler_ids=session.sampler_ids,
                user_metadata=session.user_metadata or None,
                display_name=session.display_name,
            )
    raise NotFoundError(f"there is no client session {session_id!r}", field="session_id")


@router.post("/sessions/search")
async def search_sessions(
    broker: BrokerOf, body: Annotated[SessionSearchRequest, Depends(body_of(SessionSearchRequest))]
) -> SessionSearchResponse:
    """Newest first, within the tenant, who is the only owner that it can see."""
    if body.project_ids is not None:
        await check_projects(broker, body.project_ids)
    found = [session for session in await _sessions(broker) if _matches(session, body)]
    if body.cursor is not None:
        after = (body.cursor.last_created_at.timestamp(), body.cursor.last_session_id)
        found = [session for session in found if (session.created_at, session.session_id) < after]
    found.sort(key=lambda session: (session.created_at, session.session_id), reverse=True)
    page, rest = found[: body.limit], found[body.limit :]
    checkpoints = await broker.look("checkpoints", list[Checkpoint])
    last = page[-1] if rest else None
    return SessionSearchResponse(
        sessions=[_summary(session, checkpoints) for session in page],
        next_cursor=last
        and SessionSearchCursor(last_created_at=moment(last.created_at), last_session_id=last.session_id),
    )


def _matches(session: ClientSession, search: SessionSearchRequest) -> bool:
    if search.project_ids is not None and session.project not in search.project_ids:
        return False
    if search.statuses is not None and not any(_has_status(session, query) for query in search.statuses):
        return False
    if any(session.user_metadata.get(key) != value for key, value in search.user_metadata.items()):
        return False
    if search.session_id is None and search.display_name is None:
        return True
    name, words = (session.display_name or "").lower(), (search.display_name or "").lower().split()
    return session.session_id == search.session_id or (bool(words) and all(word in name for word in words))


def _has_status(session: ClientSession, query: Any) -> bool:
    if query.type == "client_finished":
        return session.status in (query.reasons or ("success", "errored", "interrupted"))
    return query.type == "active" and session.status == "active"


def _summary(session: ClientSession, checkpoints: list[Checkpoint]) -> SessionSummary:
    runs = set(session.training_run_ids)
    mine = [c for c in checkpoints if c.tinker_path.removeprefix("tinker://").partition("/")[0] in runs]
    return SessionSummary(
        session_id=session.session_id,
        created_at=moment(session.created_at),
        owner=session.owner,
        project_id=session.project,
        status=_status(session),
        checkpoints_count=len(mine),
        display_name=session.display_name,
        user_metadata=session.user_metadata or None,
        checkpoint_storage_bytes=sum(c.size_bytes for c in mine),
    )


def _status(session: ClientSession) -> SessionStatus | None:
    match session.status:
        case "active":
            return SessionActive()
        case "success":
            return ClientSessionFinished(reason=ClientSessionFinishSuccess(), detail=session.detail)
        case "errored":
            return ClientSessionFinished(reason=ClientSessionFinishErrored(), detail=session.detail)
        case "interrupted":
            return ClientSessionFinished(reason=ClientSessionFinishInterrupted(), detail=session.detail)
        case None:
            return None
