"""`python -m tests.gateway.programs ROOM.NAME [ARGUMENT...]` runs one and prints what it saw, as a line of JSON.

TINKER_BASE_URL and TINKER_API_KEY say where, and as whom.
"""

import importlib
import json
import os
import sys

if __name__ == "__main__":
    where, *arguments = sys.argv[1:]
    room, _, name = where.partition(".")
    if room != "tensors":  # the SDK does without torch where it is missing, and imports it for two seconds where not
        sys.modules["torch"] = None  # type: ignore[assignment]
    program = getattr(importlib.import_module(f"{__package__}.{room}"), name)
    print(json.dumps(program(*arguments)), flush=True)
    # The SDK's background threads do not stop at the end; seldom, one of them aborts Python's own clean-up.
    os._exit(0)
