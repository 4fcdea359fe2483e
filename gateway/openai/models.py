"""The models that there are: base models, and the tenant's weights to sample from."""

from typing import Any

from ..chat.endpoint import Call
from ..chat.models import Listed, described, listed


async def list_models(call: Call) -> None:
    found = await listed(call.broker)
    await call.reply.json({"object": "list", "data": [_shown(model) for model in found]})


async def get_model(call: Call) -> None:
    await call.reply.json(_shown(await described(call.broker, call.request.path_params["model"])))


def _shown(model: Listed) -> dict[str, Any]:
    owner = "lorry" if model.is_base else "tenant"
    return {"id": model.name, "object": "model", "created": model.created, "owned_by": owner}
