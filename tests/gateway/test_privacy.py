"""A tenant with another's ids, at every route that there is, learns nothing: it is told what it is told of ids that
nobody has. Prompts and samples are in no log, event or error."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import httpx
from starlette.routing import Route

from lorry.gateway import app
from lorry.storage.store import Store

from .conftest import Tenant
from .refusals import ADAM
from .test_requests import a_pass, a_run, a_sample


@dataclass(frozen=True, slots=True)
class Things:
    run_id: str
    sampler_id: str
    session_id: str
    checkpoint_id: str
    place: str
    request_id: str

    @property
    def path(self) -> str:
        return f"tinker://{self.run_id}/{self.checkpoint_id}"

    def hide(self, text: str) -> str:
        names = [self.path, *(str(getattr(self, name)) for name in self.__slots__)]
        for name in sorted(filter(None, names), key=len, reverse=True):
            text = text.replace(name, "…")
        return text


NOBODYS = Things(
    "session-0000000000000000:train:0",
    "session-0000000000000000:sample:0",
    "session-0000000000000000",
    "weights/kept",
    "session-0000000000000000:train:0/weights/kept.2",
    "",
)

Body = Callable[[Things], Any]
LORA = {"rank": 4}
BODIES: dict[str, Body] = {
    "/jobs": lambda of: None,  # it is asked with ?run=
    "/forward": lambda of: a_pass(of.run_id),
    "/forward_backward": lambda of: a_pass(of.run_id),
    "/optim_step": lambda of: {"model_id": of.run_id, "seq_id": 2, "optim_params": ADAM},
    "/retrieve_future": lambda of: {"request_id": of.request_id},
    "/retrieve_futures": lambda of: {
        "target": {"type": "sampling_session", "sampling_session_id": of.sampler_id, "cloned_sampler_id": 0},
        "timeout": 0,
    },
    "/cancel_future": lambda of: {"request_id": of.request_id},
    "/create_sampling_session": lambda of: {
        "session_id": of.session_id,
        "sampling_session_seq_id": 7,
        "model_path": of.path,
    },
    "/join_sampling_session": lambda of: {"sampling_session_id": of.sampler_id},
    "/asample": lambda of: a_sample(of.sampler_id, 5),
    "/save_weights": lambda of: {"model_id": of.run_id, "seq_id": 2, "path": "x"},
    "/save_weights_for_sampler": lambda of: {"model_id": of.run_id, "seq_id": 2, "path": "x"},
    "/save_weights_external": lambda of: {"model_id": of.run_id, "seq_id": 2, "path": "x"},
    "/load_weights": lambda of: {"model_id": of.run_id, "seq_id": 2, "path": of.path, "optimizer": False},
    "/create_model": lambda of: {
        "session_id": of.session_id,
        "model_seq_id": 7,
        "base_model": "jargon-1m",
        "lora_config": LORA,
    },
    "/get_info": lambda of: {"model_id": of.run_id},
    "/unload_model": lambda of: {"model_id": of.run_id},
    "/session_heartbeat": lambda of: {"session_id": of.session_id},
    "/sessions/{session_id}/finish": lambda of: {"reason": {"type": "success"}},
    "/sessions/search": lambda of: {"session_id": of.session_id},
    "/checkpoints/delete": lambda of: {"training_run_id": of.run_id},
    "/weights_info": lambda of: {"tinker_path": of.path},
    "/copy_weights": lambda of: {"source_path": of.path, "session_id": of.session_id, "model_seq_id": 8},
    "/training_runs/{run_id}/checkpoints/{checkpoint_id:path}/ttl": lambda of: {"ttl_seconds": 1},
    "/sessions/{session_id}/project": lambda of: {"project_id": "x"},
    "/training_runs/{run_id}/priority": lambda of: {"priority": 1},
    "/training_runs/{run_id}/metrics": lambda of: {"points": [{"step": 0, "values": {"x": 1.0}}]},
    "/samplers/{sampler_id}/priority": lambda of: {"priority": 1},
}
NAME_NOTHING = {
    "/healthz",
    "/readyz",
    "/client/config",
    "/client/dynamic_config",
    "/get_server_capabilities",
    "/telemetry",
    "/auth/token",
    "/auth/apikey/me",
    "/create_session",
    "/create_custom_loss",
    "/sessions",
    "/training_runs",
    "/checkpoints",
    "/billing/usage/checkpoints/current",
    "/billing/usage/events",
    "/audit",
}


def routes() -> list[tuple[str, str]]:
    found = [route for module in app._ROUTERS for route in module.router.routes if isinstance(route, Route)]  # pyright: ignore[reportPrivateUsage]
    return sorted({(method, route.path) for route in found for method in route.methods or () if method != "HEAD"})


def asked(http: httpx.Client, method: str, path: str, of: Things) -> str:
    fields = {name: getattr(of, name) for name in ("run_id", "sampler_id", "session_id", "checkpoint_id", "place")}
    place = path.replace(":path}", "}").format(**fields, file="adapter_model.safetensors").lstrip("/")
    place += f"?run={of.run_id}" if path == "/jobs" else ""
    place += f"?expires={10**10}&signature=00" if path.startswith("/files/") else ""
    body = BODIES[path](of) if path in BODIES else None
    sent = {"content": body} if isinstance(body, bytes) else {} if body is None else {"json": body}
    answer = http.request(method, place, **sent)  # type: ignore[arg-type]
    return of.hide(f"{answer.status_code} {answer.text}")


def test_every_route_is_tried_or_names_nothing() -> None:
    paths = {path for _, path in routes()}
    assert paths >= NAME_NOTHING | BODIES.keys()
    assert {path for path in paths - NAME_NOTHING - BODIES.keys() if "{" not in path} == set()


def test_with_anothers_ids_a_tenant_is_told_what_it_is_told_of_ids_that_nobody_has(
    new_tenant: Callable[[], Tenant],
) -> None:
    alice, mallory = new_tenant(), new_tenant()
    with alice.http() as hers, mallory.http() as http:
        things = alices(hers)
        nobodys = replace(NOBODYS, request_id=things.request_id.replace(things.run_id, NOBODYS.run_id))
        before = seen(hers, things)
        malformed: list[str] = []
        for method, path in routes():
            if path in NAME_NOTHING:
                continue
            told, of_nobody = (asked(http, method, path, of) for of in (things, nobodys))
            assert told == of_nobody, f"{method} {path}"
            malformed += [f"{method} {path}: {told}"] if told.startswith("422") else []
            assert seen(hers, things) == before, f"{method} {path} touched something of hers"
        assert malformed == [], "these were refused for what they are, and not for whose it is"


USER = [{"role": "user", "content": "x"}]
TEXT: dict[str, Callable[[str], Any]] = {
    "/models/{model:path}": lambda model: None,
    "/completions": lambda model: {"model": model, "prompt": "x", "max_tokens": 1},
    "/chat/completions": lambda model: {
        "model": model,
        "messages": USER,
        "max_tokens": 1,
    },
    "/messages": lambda model: {"model": model, "messages": USER, "max_tokens": 1},
    "/messages/count_tokens": lambda model: {"model": model, "messages": USER},
}
"""The APIs of text, by what comes behind their prefixes."""
TEXT_NAMES_NOTHING = {"/models", "/messages/{rest:path}", "/{rest:path}"}


def test_every_route_of_text_is_tried_or_names_nothing() -> None:
    for prefix, routes in app._OF_TEXT.items():  # pyright: ignore[reportPrivateUsage]
        paths = {route.path for route in routes if isinstance(route, Route)}
        assert paths <= TEXT.keys() | TEXT_NAMES_NOTHING, prefix


def test_text_of_anothers_weights_is_told_what_is_told_of_weights_that_nobody_has(
    new_tenant: Callable[[], Tenant],
) -> None:
    alice, mallory = new_tenant(), new_tenant()
    with alice.http() as hers, mallory.http() as http:
        run = a_run(hers)
        asked = {"model_id": run, "seq_id": 1, "path": "kept"}
        saved = hers.post("save_weights_for_sampler", json=asked).json()["request_id"]
        path = hers.post("retrieve_future", json={"request_id": saved}).json()["path"]
        nobodys = path.replace(run, NOBODYS.run_id)
        for prefix in ("", "jargon-1m;"):
            for route, body in TEXT.items():
                told = [
                    text_asked(http, route, body(prefix + each), prefix + each).replace(each, "…")
                    for each in (path, nobodys)
                ]
                assert told[0] == told[1] and told[0].startswith("404"), route
                assert text_asked(hers, route, body(prefix + path), prefix + path).startswith("200"), route


def text_asked(http: httpx.Client, route: str, body: Any, model: str) -> str:
    url = http.base_url.copy_with(path="/v1" + route.replace("{model:path}", model))
    answer = http.get(url) if body is None else http.post(url, json=body)
    return f"{answer.status_code} {answer.text}"


def alices(http: httpx.Client) -> Things:
    run = a_run(http)
    session = run.partition(":")[0]
    body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "jargon-1m"}
    sampler = http.post("create_sampling_session", json=body).json()["sampling_session_id"]
    passed = http.post("forward_backward", content=a_pass(run, 1)).json()["request_id"]
    saved = http.post("save_weights", json={"model_id": run, "seq_id": 2, "path": "kept"}).json()["request_id"]
    for request in (passed, saved):
        while "type" in (found := http.post("retrieve_future", json={"request_id": request}).json()):
            if found["type"] != "try_again":
                break
    return Things(run, sampler, session, "weights/kept", f"{run}/weights/kept.2", passed)


def seen(http: httpx.Client, things: Things) -> list[Any]:
    lists = [http.get(path).json() for path in ("training_runs", "checkpoints", f"sessions/{things.session_id}")]
    return [*lists, http.post("get_info", json={"model_id": things.run_id}).json()]


def test_prompts_and_samples_are_in_no_event_error_or_record_of_deeds(new_tenant: Callable[[], Tenant]) -> None:
    tenant = new_tenant()
    tokens = [801, 802, 803, 804]
    with tenant.http() as http:
        run = a_run(http)
        body = {"session_id": run.partition(":")[0], "sampling_session_seq_id": 0, "base_model": "jargon-1m"}
        sampler = http.post("create_sampling_session", json=body).json()["sampling_session_id"]
        for tried, change in enumerate(({}, {"sampling_params": {"max_tokens": 2, "temperature": -1}})):
            sample = a_sample(sampler, tried) | {"prompt": {"chunks": [{"type": "encoded_text", "tokens": tokens}]}}
            answer = http.post("asample", json=sample | change).json()
            if "request_id" in answer:
                answer = http.post("retrieve_future", json={"request_id": answer["request_id"]}).json()
    store = Store(tenant.server.data)
    try:
        kept = [store.rows(f"SELECT * FROM {table}") for table in ("events", "audit", "sessions", "tenants", "usage")]
        kept.append(store.rows("SELECT error FROM results WHERE error IS NOT NULL"))
    finally:
        store.close()
    for form in (json.dumps(tokens)[1:-1], repr(tokens)[1:-1], " ".join(map(str, tokens))):
        assert form not in repr(kept)
