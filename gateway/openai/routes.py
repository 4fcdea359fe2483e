"""What lies where."""

from starlette.routing import BaseRoute, Route

from ..chat.endpoint import Endpoint, takes, takes_nothing
from .chat import chat
from .completions import complete
from .errors import API
from .models import get_model, list_models
from .requests import REFUSED, ChatRequest, CompletionRequest

ROUTES: list[BaseRoute] = [
    Route("/models", Endpoint(API, {"GET": takes_nothing(list_models)})),
    Route("/models/{model:path}", Endpoint(API, {"GET": takes_nothing(get_model)})),
    Route("/completions", Endpoint(API, {"POST": takes(CompletionRequest, complete, REFUSED)})),
    Route("/chat/completions", Endpoint(API, {"POST": takes(ChatRequest, chat, REFUSED)})),
]
NOWHERE: list[BaseRoute] = [Route("/{rest:path}", Endpoint(API, {}))]
"""Last: whatever else is asked for is told in this API's words that it is not there."""
