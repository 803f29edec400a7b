"""Pages of other sites: a browser that shows one can be made to send requests here."""

from __future__ import annotations

import re
from collections.abc import Collection
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.requests import Request

from api.refusals import CrossSite, MisdirectedRequest

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:/?#@\[\]]+)(:\d+)?")


def is_loopback(host: str) -> bool:
    """Whether a host name or address, without a port, can only be this machine."""
    try:
        return host == "localhost" or ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_host(request: Request, hosts: Collection[str]) -> None:
    """Raise MisdirectedRequest unless the request is addressed to this machine, or to one of `hosts`.

    Any site can let its name point to 127.0.0.1 (DNS rebinding), and its pages may then read what answers there; but
    the browser writes that name into Host.
    """
    given = request.headers.getlist("host")
    matched = _HOST.fullmatch(given[0].lower()) if len(given) == 1 else None
    if matched is None or not (is_loopback(matched[1]) or matched[1] in hosts):
        raise MisdirectedRequest(
            "a service that asks for no key answers only to names of its own machine, and to those in "
            "BITFRONTIER_HOSTS",
            field="Host",
            value=", ".join(given),
            accepted=["localhost", "127.0.0.1", "[::1]", *hosts],
        )


def check_same_origin(request: Request) -> None:
    """Raise CrossSite when a page of another origin sent a request that changes something.

    Another port of this machine is another origin. What is no browser sends neither header.
    """
    if request.method in SAFE_METHODS:
        return
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site is not None:
        foreign = site not in ("same-origin", "none")
    else:
        foreign = origin is not None and place_of(origin) != request.headers.get("host", "").lower()
    if foreign:
        raise CrossSite(
            f"{request.method} is taken from this service's own pages only, or with a key in Authorization",
            field="Origin" if site is None else "Sec-Fetch-Site",
            value=origin if site is None else site,
        )


def place_of(origin: str) -> str | None:
    """Host and port of a URL; None when it has none."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None
