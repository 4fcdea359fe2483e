"""Short-lived tokens (JWT, HS256) that stand for an API key: clients exchange one for the other. They end with it.

Pure; the time and the secret are passed in.
"""

import base64
import hashlib
import hmac
import json
from typing import Any

from ...wire.ids import KeyHash, TenantId

LIFETIME_S = 3600


def mint(tenant: TenantId, key: KeyHash, now: float, secret: bytes) -> str:
    header = _encode({"alg": "HS256", "typ": "JWT"})
    claims = {"iss": "lorry", "sub": f"lorry:tenant:{tenant}", "org_id": tenant, "key": key}
    body = f"{header}.{_encode(claims | {'iat': int(now), 'exp': int(now) + LIFETIME_S})}"
    return f"{body}.{_sign(body, secret)}"


def key_behind(token: str, now: float, secret: bytes) -> KeyHash | None:
    """None for a token that was not minted with `secret`, or has expired."""
    body, _, signature = token.rpartition(".")
    if not hmac.compare_digest(signature.encode(), _sign(body, secret).encode()):
        return None
    # The signature is ours, so what it signs is what `mint` wrote.
    payload = body.partition(".")[2]
    claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return KeyHash(claims["key"]) if claims["exp"] > now else None


def _encode(part: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()


def _sign(body: str, secret: bytes) -> str:
    return base64.urlsafe_b64encode(hmac.digest(secret, body.encode(), hashlib.sha256)).rstrip(b"=").decode()
