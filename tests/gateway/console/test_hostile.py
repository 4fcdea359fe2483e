"""A hundred hostile strings, as names, metadata, metrics and prompts, show as text, and nothing else happens."""

import time
from collections.abc import Callable
from urllib.parse import quote, urlencode

import anyio
import pytest
from playwright.sync_api import Page

import lorry
from lorry.storage.store import Store
from lorry.wire.ids import TenantId
from tests.conftest import Server
from tests.gateway.conftest import Tenant

from .visitors import CHROMIUM, NO_CHROMIUM, chromium, sign_in, visit

HURT = "window.hurt=1"
BASIC = (
    f"<script>{HURT}</script>",
    f"</script><script>{HURT}</script>",
    f"<img src=x onerror={HURT}>",
    f'"><svg onload={HURT}>',
    f"' onmouseover='{HURT}",
    f'" autofocus onfocus="{HURT}',
    f"javascript:{HURT}",
    f"<a href=javascript:{HURT}>x</a>",
    f"<iframe srcdoc='<script>parent.{HURT}</script>'>",
    f"<math><mtext></form><form><mglyph><style></math><img src onerror={HURT}>",
    f"</title><script>{HURT}</script>",
    f"</textarea><script>{HURT}</script>",
    f"<!--><script>{HURT}</script>-->",
    f"]]><script>{HURT}</script>",
    "{{ 7 * 7 }}{% for x in y %}{{ ''.__class__ }}",
    "${7*7}<%= 7*7 %>#{7*7}",
    "data: x event: fragment data: {}",
    "&lt;script&gt;&amp;#60;&#x3c;&nbsp",
    "\\u003cscript\\u003e\\\" \\' `${1}`",
    "../../../etc/passwd %2e%2e%2f %00 %0d%0a",
    "\u202egnp.exe\u2066 \ufeff \u200b zero width",
    "мир 世界 🚚 e\u0301 \U0001f468\u200d\U0001f469",
    "' OR 1=1; DROP TABLE runs; --",
    "<style>*{display:none}</style><link rel=stylesheet href=//evil>",
    "<base href=//evil><meta http-equiv=refresh content=0;url=//evil>",
)
HOSTILE = tuple(wrapped for each in BASIC for wrapped in (each, f"{each} {each}", f"x{each}", f"{each.upper()}Z"))
"""Uppercased, too: names of elements know no case."""
AT_A_TIME = 25

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)


def test_there_are_a_hundred() -> None:
    assert len(set(HOSTILE)) == len(HOSTILE) == 100


async def planted(server: Server, key: str) -> list[str]:
    """Runs of a tenant whose every word is hostile."""
    runs: list[str] = []
    async with lorry.connect(server.address, api_key=key) as service:
        for start in range(0, len(HOSTILE), AT_A_TIME):
            strings = HOSTILE[start : start + AT_A_TIME]
            metadata = dict.fromkeys(strings, strings[-1]) | {"name": strings[0]}
            training = await service.create_lora_training_client_async("jargon-1m", rank=1, user_metadata=metadata)
            await training.log_metrics({text: float(i) for i, text in enumerate(strings)}, step=0)
            runs.append(training.model_id)
    return runs


def named_keys(server: Server, tenant: str) -> str:
    """As keys are called, what can be one's name; returns an administrator's."""
    store = Store(server.data)
    try:
        for text in HOSTILE:
            store.create_key(TenantId(tenant), time.time(), name=text)
        return store.create_key(TenantId(tenant), time.time(), scopes=("admin", "read"))
    finally:
        store.close()


def shown(page: Page) -> str:
    return page.evaluate("document.documentElement.textContent")


def test_hostile_strings_show_as_text_and_nothing_else_happens(new_tenant: Callable[[], Tenant]) -> None:
    tenant = new_tenant()
    server, url = tenant.server, tenant.server.url
    runs = anyio.run(planted, server, tenant.key)
    administrator = named_keys(server, "hostile")
    said, elsewhere = list[str](), list[str]()
    with chromium() as browser:
        page = visit(browser).new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("request", lambda request: None if request.url.startswith(url) else elsewhere.append(request.url))
        sign_in(page, url, tenant.key)
        page.goto(f"{url}/console/runs")
        text = shown(page)
        assert all(hostile in text for hostile in HOSTILE)
        for at, run in enumerate(runs):
            for place in (f"runs/{run}", f"compare?run={run}"):
                page.goto(f"{url}/console/{place}")
                page.locator(".plot .uplot").nth(AT_A_TIME - 1).wait_for()
                text = shown(page)
                assert all(hostile in text for hostile in HOSTILE[at * AT_A_TIME : (at + 1) * AT_A_TIME])
        for hostile in HOSTILE[:: len(HOSTILE) // 20]:
            page.goto(f"{url}/console/runs?{urlencode({'q': hostile, 'project': hostile, 'state': hostile})}")
            assert page.get_by_label("Search").input_value() == hostile
            page.goto(f"{url}/console/checkpoints?{urlencode({'q': hostile, 'kind': hostile, 'did': hostile, 'n': 1})}")
            assert page.get_by_label("Search").input_value() == hostile
        page.goto(f"{url}/console/playground?{urlencode({'model': HOSTILE[0]})}")
        prompt = "\n".join(HOSTILE)
        page.get_by_label("Prompt").fill(prompt)
        page.get_by_label("Tokens").fill("1")
        page.get_by_role("button", name="Sample").click()
        page.get_by_role("heading", name="Answers").wait_for()
        assert page.get_by_label("Prompt").input_value() == prompt
        assert page.locator(".answer h3").all_text_contents() == [HOSTILE[0]]
        assert "there is no model" in page.locator(".answer .problem").inner_text()
        page.get_by_role("button", name="Sign out").click()
        page.get_by_label("API key").wait_for()
        sign_in(page, url, administrator)
        page.goto(f"{url}/console/tenants/hostile")
        text = shown(page)
        assert all(hostile in text for hostile in HOSTILE)
        for hostile in HOSTILE[:: len(HOSTILE) // 10]:
            refused = page.goto(f"{url}/console/tenants/{quote(hostile, safe='')}")
            assert refused is not None and refused.status in (404, 405)
        assert page.evaluate("window.hurt") is None
    # A page that is not there is told by the browser as well, which is no complaint.
    assert [each for each in said if "404" not in each and "405" not in each] == []
    assert elsewhere == []
