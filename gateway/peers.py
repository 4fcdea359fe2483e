"""Who is at the other end: the client's address, or what a proxy that is trusted says that it is. Pure."""

from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TypeAlias

from ..wire.errors import InvalidRequestError
from .config import HttpSettings

Network: TypeAlias = IPv4Network | IPv6Network

_OF_ONE_HOST = 64
"""Bits of an IPv6 address: whoever has one of the others has them all."""
_MOST_CHARACTERS = 64


def trusted(settings: HttpSettings) -> list[Network]:
    """The proxies that are believed. Raises InvalidRequestError."""
    if settings.trusted_proxies is None:
        return []
    try:
        return [ip_network(text.strip()) for text in settings.trusted_proxies.split(",")]
    except ValueError as error:
        expected = f"addresses or networks with commas in between, as 10.0.0.0/8,::1 ({error})"
        raise InvalidRequestError.of("trusted_proxies", settings.trusted_proxies, expected) from None


def is_among(host: str, networks: list[Network]) -> bool:
    try:
        address = ip_address(host)
    except ValueError:
        return False
    return any(address in network for network in networks)


def peer_of(host: str) -> str:
    """What counts as one: an IPv4 address, or all that one network of IPv6 has."""
    try:
        address = ip_address(host)
    except ValueError:
        return host[:_MOST_CHARACTERS]
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped:
            return str(address.ipv4_mapped)
        return str(ip_network((address.packed[: _OF_ONE_HOST // 8] + bytes(8), _OF_ONE_HOST)))
    return str(address)
