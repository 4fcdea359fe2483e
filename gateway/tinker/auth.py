"""Who a key belongs to: tokens in its place, what is known of it, and its deletion."""

from fastapi import APIRouter, Request
from fastapi.responses import Response
from tinker.cli.auth_api import SelfApiKeyResponse
from tinker.lib.credentials import ApiKeyDetails, ApiKeyOrgDetails, ApiKeyUserDetails
from tinker.types import AuthTokenResponse

from ...wire.admin_messages import KeyInfo
from ...wire.catalogue_messages import MintToken, RevokeKey
from ..broker import BrokerOf, api_key

router = APIRouter()


@router.post("/auth/token")
async def auth_token(broker: BrokerOf) -> AuthTokenResponse:
    return AuthTokenResponse(jwt=await broker.ask(MintToken, str))


@router.get("/auth/apikey/me")
async def describe_key(broker: BrokerOf) -> SelfApiKeyResponse:
    """Lorry's keys have no numbers, and its tenants no addresses."""
    key = await broker.look("key", KeyInfo)
    details = ApiKeyDetails(
        org_details=ApiKeyOrgDetails(name=key.tenant), user_details=ApiKeyUserDetails(email=key.tenant)
    )
    return SelfApiKeyResponse(key_id=0, name=key.tenant, note=key.name or key.key, details=details)


@router.delete("/auth/apikey/me", status_code=204)
async def delete_key(broker: BrokerOf, request: Request) -> Response:
    key = api_key(request)
    await broker.tell(lambda number: RevokeKey(number, key))
    return Response(status_code=204)
