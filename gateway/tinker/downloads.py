"""What is to be taken away, behind signed links that expire: each file of a checkpoint, all of them as a tar archive,
and traces.

A link needs no key: whoever has it has the file, until it expires.
"""

import hashlib
import hmac
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO
from urllib.parse import quote

from anyio import to_thread
from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from tinker.types import ExternalWeightsUrlsResponse

from ...wire.errors import NotFoundError
from ...wire.types import WeightsInfo
from ..broker import Broker, BrokerOf
from ..config import GatewayConfig
from ..errors import NotSupportedError
from .moments import moment

router = APIRouter()

_ARCHIVE = "archive.tar"
TRACES = "traces"
"""No checkpoint's place: each has a run before it."""
_PIECE_BYTES = 256 * 1024


def sign(key: bytes, place: str, file: str, expires: int) -> str:
    text = "\0".join((place, file, str(expires)))
    return hmac.digest(key, text.encode(), hashlib.sha256).hex()


@router.get("/training_runs/{run_id}/checkpoints/{checkpoint_id:path}/external_weights_urls")
async def external_weights_urls(
    broker: BrokerOf, request: Request, run_id: str, checkpoint_id: str
) -> ExternalWeightsUrlsResponse:
    info = await broker.look("files", WeightsInfo, f"tinker://{run_id}/{checkpoint_id}")
    files = await to_thread.run_sync(_files, _folder(_config(request), info.folder))
    expires = _expiry(request)
    urls = {name: _link(request, info.folder, name, expires) for name in files}
    return ExternalWeightsUrlsResponse(urls=urls, expires=moment(expires))


@router.get("/training_runs/{run_id}/checkpoints/{checkpoint_id:path}/archive")
async def archive_url(broker: BrokerOf, request: Request, run_id: str, checkpoint_id: str) -> Response:
    """How SDKs before 0.38 download."""
    url, expires = await archive_link(broker, request, f"tinker://{run_id}/{checkpoint_id}")
    return JSONResponse({"url": url, "expires": moment(expires).isoformat()})


async def archive_link(broker: Broker, request: Request, path: str) -> tuple[str, int]:
    """To a checkpoint's files as a tar archive, and when it expires, in Unix seconds. Raises NotFoundError,
    NotSupportedError."""
    info = await broker.look("files", WeightsInfo, path)
    _folder(_config(request), info.folder)
    expires = _expiry(request)
    return _link(request, info.folder, _ARCHIVE, expires), expires


@router.get("/files/{place:path}/{file}")
async def download(request: Request, place: str, file: str, expires: int, signature: str) -> Response:
    """What the checkpoint was when the link was made, whatever its name leads to by now."""
    config = _config(request)
    if expires < time.time() or not hmac.compare_digest(signature, sign(config.link_key, place, file, expires)):
        raise NotFoundError("this link has expired, or was never made")
    folder = _folder(config, place)
    if file == _ARCHIVE:
        archive = await to_thread.run_sync(_pack, folder)
        return StreamingResponse(_pieces(archive), media_type="application/x-tar")
    if file not in await to_thread.run_sync(_files, folder):
        raise NotFoundError(f"there is no file {file!r}")
    # To be kept, and never shown: it comes from the same place as the console's pages.
    kept = {"x-content-type-options": "nosniff"}
    return FileResponse(folder / file, headers=kept, media_type="application/octet-stream", filename=file)


def _config(request: Request) -> GatewayConfig:
    return request.app.state.gateway.config


def _folder(config: GatewayConfig, place: str) -> Path:
    """`place` is the broker's own name of a folder below its checkpoints, or that of traces beside these: it told us,
    or we signed it."""
    if config.checkpoints is None:
        raise NotSupportedError("this gateway does not see the broker's folder: start it with --data")
    return config.checkpoints.parent / TRACES if place == TRACES else config.checkpoints / place


def traces_folder(request: Request) -> Path:
    """Raises NotSupportedError."""
    return _folder(_config(request), TRACES)


def link_to_trace(request: Request, file: str) -> str:
    return _link(request, TRACES, file, _expiry(request))


def _files(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise NotFoundError("what this led to is gone")
    return sorted(file.name for file in folder.iterdir() if file.is_file())


def _expiry(request: Request) -> int:
    return int(time.time() + _config(request).link_ttl_s)


def _link(request: Request, place: str, file: str, expires: int) -> str:
    """Under the address by which this client reached us, unless we were told a better one."""
    config = _config(request)
    base = (config.url or str(request.base_url)).rstrip("/")
    where = quote(f"{place}/{file}")
    return f"{base}/api/v1/files/{where}?expires={expires}&signature={sign(config.link_key, place, file, expires)}"


def _pack(folder: Path) -> IO[bytes]:
    """A tar archive in a temporary file that is gone when it is closed."""
    packed = TemporaryFile()  # noqa: SIM115 - it is closed by whoever sends it
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name in _files(folder):
            archive.add(folder / name, arcname=name)
    packed.seek(0)
    return packed


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        while piece := file.read(_PIECE_BYTES):
            yield piece
