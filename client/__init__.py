"""The async client: the Tinker SDK's names on Lorry's own wire. Imports no torch and needs no server's code."""

from .deadlines import deadline
from .futures import Future
from .rest import RestClient
from .sampling import SamplingClient
from .service import ServiceClient, connect
from .streams import SampleStream, StreamedToken
from .training import TrainingClient

__all__ = [
    "Future",
    "RestClient",
    "SampleStream",
    "SamplingClient",
    "ServiceClient",
    "StreamedToken",
    "TrainingClient",
    "connect",
    "deadline",
]
