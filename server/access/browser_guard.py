"""What a browser can be made to send by a page of somebody else, where no key is asked for and reaching is enough."""

from __future__ import annotations

import ipaddress

from starlette.datastructures import Headers

from peqa_server.http.errors import ApiError

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_OWN_SITES = ("same-origin", "none")  # none: the person at the browser, from its address bar


def is_loopback(host: str) -> bool:
    """True when only this machine can reach `host`, a name or an address without a port."""
    name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def check_same_site(headers: Headers, method: str) -> None:
    """Raise 403 for a change that another site's page made a browser send.

    Pages cannot read what they GET from here, because no answer allows it (CORS); a POST would work unread. Browsers
    say by themselves whose page it was (Sec-Fetch-Site), whatever a proxy makes of Host; older ones send their
    page's Origin alone.
    """
    if method in _SAFE_METHODS:
        return
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        ours = site.strip().lower() in _OWN_SITES
    else:
        ours = origin is None or origin.partition("://")[2].lower() == headers.get("host", "").lower()
    if not ours:
        raise ApiError(
            403, "a page of another site sent this; a server without keys takes changes from its own page and from "
            "programs only", code="cross_site",
        )  # fmt: skip


def check_host(headers: Headers, own_host: str) -> None:
    """Raise 403 for a Host that is no name of this machine's own, on a server that listens on its loopback only.

    A site can point a name of its own at 127.0.0.1 (DNS rebinding), and a browser then takes the server for a part of
    that site. It cannot choose what the browser writes into Host.
    """
    given = headers.get("host")  # always there from a browser
    if given is None:
        return
    host = _without_port(given)
    if not is_loopback(host) and host.lower() != own_host.lower():
        raise ApiError(
            403, f"this server listens on {own_host} without keys, so it answers to that name and to localhost, not to "
            f"{given[:80]!r}; ask for it as localhost (a proxy in front: send 'Host: localhost'), or start it with "
            "--api-key-file",
            code="unknown_host",
        )  # fmt: skip


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
