"""What lies where."""

from starlette.routing import BaseRoute, Route

from ..chat.endpoint import Endpoint, takes
from .errors import API
from .messages import count_tokens, messages
from .requests import REFUSED, CountRequest, MessageRequest

ROUTES: list[BaseRoute] = [
    Route("/messages", Endpoint(API, {"POST": takes(MessageRequest, messages, REFUSED)})),
    Route("/messages/count_tokens", Endpoint(API, {"POST": takes(CountRequest, count_tokens, REFUSED)})),
    Route("/messages/{rest:path}", Endpoint(API, {})),
]
NOWHERE: list[BaseRoute] = [Route("/{rest:path}", Endpoint(API, {}))]
"""Last: whatever else is asked for is told in this API's words that it is not there."""
