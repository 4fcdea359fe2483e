"""Whether a request that changes something was sent by a page of this site. Pure.

Browsers say where a request comes from, and no page can make them say otherwise: by `Sec-Fetch-Site` where a site
counts as secure, by `Origin` at every form that is posted.
"""

from collections.abc import Mapping
from urllib.parse import urlsplit


def is_own(headers: Mapping[str, str]) -> bool:
    """`headers` by their names in lower case. What says nothing of where it comes from is no browser's, and refused:
    there are APIs for it."""
    if site := headers.get("sec-fetch-site"):
        return site == "same-origin"
    origin = headers.get("origin")
    try:
        return origin is not None and urlsplit(origin).netloc == headers.get("host", "") != ""
    except ValueError:
        return False
