"""Requests to places that clients have named: only where they may go, and to the very address that was checked.

A name is resolved once; each of its addresses must be public, whatever form the URL gave them in. No redirect is
followed, no proxy asked, and of the answer nothing but its head is read.
"""

import ipaddress
import socket
from collections.abc import Mapping
from typing import NamedTuple

import anyio
import httpx

from service.errors import AddressRefused, RankscopeError

RESOLVE_S = 3.0
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Unreachable(RankscopeError):
    """Nobody answered at any of the addresses."""


class Target(NamedTuple):
    """A URL, and the addresses that its host has."""

    url: httpx.URL
    addresses: list[str]


def is_public(address: Address) -> bool:
    """Whether an address is of the open internet, and holds no address of another network."""
    is_special = address.is_multicast or address.is_reserved
    if isinstance(address, ipaddress.IPv6Address):
        is_special |= address.is_site_local or address.sixtofour is not None
    return address.is_global and not is_special


def parse(text: str) -> httpx.URL:
    """The URL, if it is one of HTTP with a host and without a password. Raises AddressRefused."""
    try:
        url = httpx.URL(text)
        host, port = url.host, url.port  # Decoded only now: a name may be no name.
    except (httpx.InvalidURL, ValueError):
        raise AddressRefused("is no URL") from None
    if url.scheme not in {"http", "https"} or not host:
        raise AddressRefused("must be http://host/… or https://host/…")
    if port is not None and not 0 < port < 2**16:
        raise AddressRefused("has no port between 1 and 65535")
    if url.userinfo:
        raise AddressRefused("must not hold a user name or a password")
    return url


async def resolve(text: str, *, private: bool) -> Target:
    """Where a URL leads now. Raises AddressRefused where that is nowhere, or not public and `private` is False."""
    url = parse(text)
    port = url.port or {"http": 80, "https": 443}[url.scheme]
    try:
        with anyio.fail_after(RESOLVE_S):
            found = await anyio.getaddrinfo(url.host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # A TimeoutError is an OSError.
        raise AddressRefused("has a host whose address is not found") from None
    addresses = list(dict.fromkeys(str(place[0]) for *_, place in found))
    if not private and not all(is_public(ipaddress.ip_address(address)) for address in addresses):
        raise AddressRefused("leads to an address that is not public")
    return Target(url, addresses)


def new_client(limit_s: float) -> httpx.AsyncClient:
    """A client for `post`; connections are not kept, for each was checked for one host alone."""
    return httpx.AsyncClient(
        verify=httpx.create_ssl_context(),
        trust_env=False,
        follow_redirects=False,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        timeout=httpx.Timeout(limit_s, connect=limit_s / 3),  # One address that is silent leaves time for another.
    )


async def post(client: httpx.AsyncClient, target: Target, headers: Mapping[str, str], body: bytes) -> int:
    """The status of the answer of the first address that can be reached. Raises Unreachable, TimeoutError."""
    failure: Exception | None = None
    for address in target.addresses:
        request = client.build_request(
            "POST",
            target.url.copy_with(host=address),
            headers={"host": target.url.netloc.decode(), **headers},
            content=body,
            extensions={"sni_hostname": target.url.host},  # whose certificate it must be
        )
        try:
            response = await client.send(request, stream=True)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            failure = error
            continue
        except httpx.TimeoutException:
            raise TimeoutError from None
        except httpx.HTTPError as error:
            raise Unreachable(f"the connection broke: {type(error).__name__}") from error
        await response.aclose()  # Its body may be endless.
        return response.status_code
    raise Unreachable("no connection could be made") from failure
