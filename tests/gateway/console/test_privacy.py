"""At every page, with another tenant's ids, a tenant is told what it is told of ids that nobody has."""

import io
import tarfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
from starlette.routing import Route

from lorry.gateway.console import app as console
from tests.gateway.conftest import Tenant
from tests.gateway.test_privacy import NOBODYS, Things, alices

from .visitors import signed_in

Ask = Callable[[Things], tuple[str, dict[str, Any] | None]]
"""Where, and with which form."""
ASKED: dict[str, list[Ask]] = {
    "/runs/{run_id}": [lambda of: (f"/runs/{of.run_id}", None)],
    "/runs/{run_id}/metrics": [lambda of: (f"/runs/{of.run_id}/metrics", None)],
    "/compare": [lambda of: (f"/compare?run={of.run_id}", None)],
    "/curves": [lambda of: (f"/curves?run={of.run_id}", None)],
    "/live": [lambda of: (f"/live?page=run&run={of.run_id}", None)],
    "/download": [lambda of: (f"/download?path={of.path}", None)],
    "/checkpoints": [
        lambda of, what=what: ("/checkpoints", {"what": what, "path": of.path, "hours": "1"})
        for what in ("delete", "publish", "hide", "expire")
    ],
    "/playground": [
        lambda of: (f"/playground?model={of.path}", None),
        lambda of: ("/playground", {"model": of.path, "prompt": "x", "max_tokens": "1"}),
    ],
}
NAME_NOTHING = {"/", "/runs", "/alarms", "/waiting", "/usage", "/audit", "/sign-in", "/sign-out"}
OF_ADMINISTRATORS = {"/deployment", "/tenants", "/tenants/{tenant}", "/storage"}


def routes() -> list[Route]:
    return [route for route in console.ROUTES if isinstance(route, Route)]


def asked(client: httpx.Client, ask: Ask, of: Things) -> str:
    place, form = ask(of)
    answer = client.get(place) if form is None else client.post(place, data=form)
    return of.hide(f"{answer.status_code} {answer.headers.get('location')} {answer.text}")


def test_every_page_is_tried_or_names_nothing() -> None:
    assert {route.path for route in routes()} == ASKED.keys() | NAME_NOTHING | OF_ADMINISTRATORS


def test_with_anothers_ids_a_tenant_is_told_what_it_is_told_of_ids_that_nobody_has(
    new_tenant: Callable[[], Tenant],
) -> None:
    alice, mallory = new_tenant(), new_tenant()
    with (
        alice.http() as http,
        signed_in(alice.server.url, alice.key) as hers,
        signed_in(mallory.server.url, mallory.key) as client,
    ):
        things = alices(http)
        nobodys = replace(NOBODYS, request_id="")
        seen = [hers.get(place).text for place in ("/checkpoints", f"/runs/{things.run_id}")]
        assert all(things.run_id in each for each in seen)
        link = hers.get("/download", params={"path": things.path})
        assert (link.status_code, link.headers["location"].partition("?")[0][-12:]) == (303, "/archive.tar")
        with tarfile.open(fileobj=io.BytesIO(httpx.get(link.headers["location"]).content)) as archive:
            assert "adapter_model.safetensors" in archive.getnames()
        for path, asks in ASKED.items():
            for ask in asks:
                told, of_nobody = (asked(client, ask, of) for of in (things, nobodys))
                assert told == of_nobody, path
        for path in ("/runs", "/alarms", "/waiting", "/checkpoints", "/usage", "/audit", "/playground"):
            text = client.get(path).text
            assert all(name not in text for name in (things.run_id, things.session_id, things.sampler_id)), path
        for path in OF_ADMINISTRATORS:
            assert client.get(path.replace("{tenant}", "x")).status_code == 403
        still = httpx.get(f"{alice.server.url}/api/v1/checkpoints", headers={"X-API-Key": alice.key}).json()
        assert [each["tinker_path"] for each in still["checkpoints"]] == [things.path]
        assert not still["checkpoints"][0]["public"] and still["checkpoints"][0]["expires_at"] is None


def test_a_key_sees_what_its_scopes_allow(new_tenant: Callable[[], Tenant]) -> None:
    tenant = new_tenant()
    said = tenant.lorry("keys", "create", "--tenant", "measures", "--scope", "sample")
    with signed_in(tenant.server.url, said.split()[-1]) as client:
        refused = client.get("/runs")
        assert refused.status_code == 403
        assert "expected read" in refused.text
        assert "Sign out" in refused.text
