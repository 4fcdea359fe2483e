"""The console's door: a sign-in cannot be forced, fixed, or ridden from another site, and it ends."""

import re
import time
from collections import Counter
from pathlib import Path

import anyio
import httpx
import pytest
import zstandard
from starlette.routing import Route

from lorry.gateway.app import running
from lorry.gateway.config import GatewayConfig
from lorry.gateway.console import app as console
from lorry.gateway.console.safety import HEADERS
from lorry.wire.ids import TenantId
from tests.gateway.test_guests import door

TRIES_EACH = 100


def of(http: httpx.AsyncClient) -> str:
    """The console of this gateway."""
    return str(http.base_url.copy_with(path="/console"))


def origin(http: httpx.AsyncClient) -> str:
    return str(http.base_url.copy_with(path="")).rstrip("/")


async def shown(http: httpx.AsyncClient, key: str, to: str = "", **headers: str) -> httpx.Response:
    """A key, at the door, by its own form."""
    form = {"api_key": key} | ({"to": to} if to else {})
    return await http.post(f"{of(http)}/sign-in", data=form, headers={"origin": origin(http)} | headers)


async def test_the_cookie_holds_no_key_and_no_script_reads_it(tmp_path: Path) -> None:
    async with door(tmp_path) as (service, http):
        answer = await shown(http, service.key)
        assert (answer.status_code, answer.headers["location"]) == (303, "/console")
        name, *attributes = answer.headers["set-cookie"].split("; ")
        assert sorted(attributes) == ["HttpOnly", "Max-Age=3600", "Path=/console", "SameSite=Lax"]
        assert name.startswith("lorry_console=eyJ") and service.key not in name
        assert (await http.get(f"{of(http)}/runs")).status_code == 200
        assert (await http.get("get_server_capabilities")).status_code == 401, "for the console alone"


async def test_behind_tls_the_cookie_is_of_this_host_alone(tmp_path: Path) -> None:
    async with door(tmp_path, trusted_proxies="127.0.0.1") as (service, http):
        answer = await shown(http, service.key, **{"x-forwarded-proto": "https"})
        name, *attributes = answer.headers["set-cookie"].split("; ")
        assert name.startswith("__Host-lorry_console=")
        assert {"Secure", "HttpOnly", "Path=/", "SameSite=Lax"} <= set(attributes)


@pytest.mark.parametrize("many", [1000, pytest.param(10_000, marks=pytest.mark.long)])
async def test_many_tries_open_nothing_and_who_has_a_key_comes_in_meanwhile(tmp_path: Path, many: int) -> None:
    async with door(tmp_path, trusted_proxies="127.0.0.1") as (service, http):
        there = {"x-forwarded-for": "10.0.0.1"}
        assert (await shown(http, service.key, **there)).status_code == 303
        http.cookies.clear()
        statuses = Counter[int]()
        limit = anyio.CapacityLimiter(64)

        async def tries(address: int) -> None:
            peer = f"10.0.{address // 200}.{address % 200 + 1}"
            for number in range(TRIES_EACH):
                async with limit:
                    answer = await shown(http, f"tml-{address}-{number}", **{"x-forwarded-for": peer})
                statuses[answer.status_code] += 1
                assert "set-cookie" not in answer.headers

        async with anyio.create_task_group() as tasks:
            for address in range(many // TRIES_EACH):
                tasks.start_soon(tries, address)
            assert (await shown(http, service.key, **there)).status_code == 303
            http.cookies.clear()
        assert statuses.total() == many
        assert statuses.keys() <= {401, 429}
        assert (await http.get(f"{of(http)}/runs")).headers["location"].startswith("/console/sign-in")
        assert (await shown(http, service.key, **there)).status_code == 303


async def test_a_wrong_key_is_told_so_without_a_word_of_it(tmp_path: Path) -> None:
    async with door(tmp_path) as (_, http):
        for key in ("tml-wrong", "", "eyJhbGciOiJub25lIn0.e30.", "eyJ", "<script>x</script>", "\x00", "ключ"):
            answer = await shown(http, key)
            assert answer.status_code == 401, key
            assert "This key opens nothing." in answer.text
            assert not key or key not in answer.text
            assert "set-cookie" not in answer.headers


async def test_what_nobody_has_shown_a_key_for_is_read_in_small_and_only_from_our_own_pages(tmp_path: Path) -> None:
    async with door(tmp_path) as (_, http):
        large = b"api_key=" + b"%41" * (1 << 19)
        own = {"origin": origin(http)}
        answer = await http.post(f"{of(http)}/sign-in", content=large, headers=own)
        assert answer.status_code == 413
        assert "the form has more than 1,048,576 bytes" in answer.text
        packed = zstandard.compress(b"api_key=" + b"A" * (1 << 26))
        answer = await http.post(f"{of(http)}/sign-in", content=packed, headers=own | {"content-encoding": "zstd"})
        assert answer.status_code == 422, "it is read as it came"
        answer = await http.post(f"{of(http)}/sign-in", content=large)
        assert answer.status_code == 403


async def test_a_session_cannot_be_fixed(tmp_path: Path) -> None:
    """What a browser was given before is not what it has after its user signed in."""
    async with door(tmp_path) as (service, http):
        await shown(http, service.store.create_key(TenantId("mallory"), time.time()))
        planted = http.cookies["lorry_console"]
        await shown(http, service.key)
        assert http.cookies["lorry_console"] != planted
        assert "mallory" not in (await http.get(f"{of(http)}/runs")).text
        for garbage in ("x", "eyJ.x.y", planted[:-2], planted + "x", "a" * 5000):
            answer = await http.get(f"{of(http)}/runs", headers={"cookie": f"lorry_console={garbage}"})
            assert answer.status_code == 303, "to the door"
        other_name = {"cookie": f"__Host-lorry_console={planted}"}
        http.cookies.clear()
        assert (await http.get(f"{of(http)}/runs", headers=other_name)).status_code == 303


FOREIGN = (
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"origin": "https://evil.example", "sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {},
)


def changing() -> list[str]:
    """Every path that takes something other than a question, from the code."""
    routes = [route for route in console.ROUTES if isinstance(route, Route)]
    return sorted({route.path for route in routes if (route.methods or set()) - {"GET", "HEAD"}})


async def test_no_other_site_signs_anybody_in_or_out_or_changes_anything(tmp_path: Path) -> None:
    assert {"/sign-in", "/sign-out", "/checkpoints", "/playground", "/deployment", "/tenants"} < set(changing())
    async with door(tmp_path) as (service, http):
        key = service.store.create_key(TenantId("boss"), time.time(), scopes=("admin", "train", "read", "sample"))
        await shown(http, key)
        before = (await http.get(f"{of(http)}/tenants")).text
        for path in changing():
            for headers in FOREIGN:
                form = {"api_key": key, "what": "create", "tenant": "ridden", "actor": "x", "path": "x"}
                place = of(http) + path.replace("{tenant}", "boss")
                answer = await http.post(place, data=form, headers=headers)
                assert answer.status_code == 403, path
                assert "was not sent by a page of the console" in answer.text
                assert "set-cookie" not in answer.headers
        assert (await http.get(f"{of(http)}/tenants")).text == before
        own = {"origin": origin(http)}
        made = await http.post(f"{of(http)}/tenants", data={"what": "create", "tenant": "own"}, headers=own)
        assert (made.status_code, made.headers["location"]) == (303, "/console/tenants/own")


@pytest.mark.parametrize(
    "to",
    [
        "https://evil.example",
        "//evil.example",
        "/\\evil.example",
        "/console\\..\\..\\evil",
        "/consoles",
        "javascript:alert(1)",
        "/console/\r\nset-cookie: x=y",
        "/api/v1/healthz",
    ],
)
async def test_after_the_door_is_a_page_of_the_console(tmp_path: Path, to: str) -> None:
    async with door(tmp_path) as (service, http):
        assert (await shown(http, service.key, to)).headers["location"] == "/console"
        assert (await shown(http, service.key, "/console/usage?days=3")).headers["location"] == "/console/usage?days=3"


async def test_who_is_not_signed_in_gets_to_the_door_and_then_where_he_wanted(tmp_path: Path) -> None:
    async with door(tmp_path) as (_, http):
        answer = await http.get(f"{of(http)}/usage", params={"days": "3"})
        assert answer.headers["location"] == "/console/sign-in?to=/console/usage%3Fdays%3D3"
        asked = await http.get(str(http.base_url.copy_with(path="")).rstrip("/") + answer.headers["location"])
        (to,) = re.findall(r'name="to" value="([^"]*)"', asked.text)
        assert to == "/console/usage?days=3"
        for script in ("application/json", "text/event-stream"):
            answer = await http.get(f"{of(http)}/live?page=runs", headers={"accept": script})
            assert answer.status_code == 401


async def test_a_sign_in_ends_by_itself_with_its_key_and_by_its_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with door(tmp_path) as (service, http):
        await shown(http, service.key)
        first = http.cookies["lorry_console"]
        started = time.time()
        assert "set-cookie" not in (await http.get(f"{of(http)}/runs")).headers
        monkeypatch.setattr(time, "time", lambda: started + 1000)
        renewed = await http.get(f"{of(http)}/runs")
        assert "lorry_console=eyJ" in renewed.headers["set-cookie"]
        monkeypatch.setattr(time, "time", lambda: started + 3700)
        late = await http.get(f"{of(http)}/runs", headers={"cookie": f"lorry_console={first}"})
        assert late.status_code == 303
        monkeypatch.undo()
        out = await http.post(f"{of(http)}/sign-out", headers={"origin": origin(http)})
        assert "Max-Age=0" in out.headers["set-cookie"]
        assert (await http.get(f"{of(http)}/runs")).status_code == 303
        await shown(http, service.key)
        assert (await http.get(f"{of(http)}/runs")).status_code == 200
        revoked = await http.delete("auth/apikey/me", headers={"X-API-Key": service.key})
        assert revoked.status_code == 204
        assert (await http.get(f"{of(http)}/runs")).status_code == 303


async def test_any_gateway_knows_who_signed_in_at_another(tmp_path: Path) -> None:
    async with door(tmp_path) as (service, http), running(GatewayConfig(service.address, port=0)) as other:
        await shown(http, service.key)
        assert (await http.get(f"{other}/console/runs")).status_code == 200  # a cookie knows no ports


async def test_pages_are_counted_by_what_they_are_of_and_not_by_whose(tmp_path: Path) -> None:
    async with door(tmp_path) as (service, http):
        await shown(http, service.store.create_key(TenantId("boss"), time.time(), scopes=("read", "metrics")))
        for path in ("/runs", "/runs/run-1", "/live?page=x", "/nowhere", "/static/live.js"):
            await http.get(of(http) + path)
        key = service.store.create_key(TenantId("boss"), time.time(), scopes=("metrics",))
        text = (await http.get(str(http.base_url.copy_with(path="/metrics")), headers={"X-API-Key": key})).text
        routes = set(re.findall(r'lorry_http_requests_total\{.*route="([^"]*)"', text))
        assert routes == {"/console/sign-in", "/console/runs", "/console/runs/{run_id}", "/console/live", "unknown"}


async def test_every_answer_has_a_strict_policy(tmp_path: Path) -> None:
    async with door(tmp_path) as (service, http):
        await shown(http, service.key)
        for path in ("/runs", "/nowhere", "/runs/nobody", "/tenants", "/usage?days=x", "/static/live.js", "/static/no"):
            answer = await http.get(of(http) + path)
            assert {name: answer.headers[name] for name in HEADERS} == dict(HEADERS), path
            assert answer.headers["cache-control"] == ("no-cache" if path == "/static/live.js" else "no-store"), path
        named = re.findall(r'href="/console(/static/[^"]*)"', (await http.get(f"{of(http)}/runs")).text)
        assert len(named) >= 2
        for path in named:
            assert "immutable" in (await http.get(of(http) + path)).headers["cache-control"]
        policy = HEADERS["content-security-policy"]
        assert "unsafe" not in policy and "default-src 'none'" in policy and "frame-ancestors 'none'" in policy


async def test_a_mistake_is_a_page_that_says_what_is_wrong(tmp_path: Path) -> None:
    async with door(tmp_path) as (service, http):
        await shown(http, service.key)
        for path, status, said in (
            ("/nowhere", 404, "Not Found: /console/nowhere"),
            ("/runs/nobody", 404, "there is no run &#39;nobody&#39;"),
            ("/compare", 400, "expected 1 to 20 runs"),
            ("/usage?days=400", 422, "days"),
            ("/tenants", 403, "expected admin"),
            ("/live?page=x", 400, "expected one of runs, run"),
        ):
            answer = await http.get(of(http) + path)
            assert (answer.status_code, answer.headers["content-type"]) == (status, "text/html; charset=utf-8"), path
            assert said in answer.text, answer.text
            assert "Sign out" in answer.text or path == "/nowhere"
        assert (await http.get(f"{of(http)}/runs")).status_code == 200
