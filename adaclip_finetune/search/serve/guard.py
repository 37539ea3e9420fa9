"""What every request must pass before it is answered (Host, origin, rate, size, token), and headers of every answer."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adaclip_finetune.search.serve.address import may_be_called
from adaclip_finetune.search.serve.rates import Rate

MAX_URL = 8192  # bytes

_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "media-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


@dataclass(frozen=True)
class Policy:
    """Who may ask, and how much. `host` is what we listen on, `reachable` whether other machines can reach that;
    `costly` is how the paths begin that make the model work."""

    host: str
    port: int
    reachable: bool
    token: str | None
    max_body: int  # bytes
    costly: str = "/api/search"
    requests: Rate = field(default_factory=lambda: Rate(per_second=60, burst=300))
    queries: Rate = field(default_factory=lambda: Rate(per_second=5, burst=20))


class Guard:
    """Stands in front of `app`, and refuses in its place."""

    def __init__(self, app: ASGIApp, policy: Policy) -> None:
        self.app, self.policy = app, policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close"})
        answer = self._refusal(scope, Headers(scope=scope))
        await (answer or self.app)(scope, receive, _with_headers(send))

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        """The answer to a request that may not pass."""
        policy = self.policy
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not may_be_called(hosts[0], policy.host, policy.reachable):
            return _refused(421, "this server does not go by that name (Host)")
        if not _same_site(scope, headers, hosts[0]):
            return _refused(403, "a page of another site asks; open this server's own page")
        # After the pages of others were sent away, who could else use up what the user may ask.
        address = (scope.get("client") or ("",))[0]
        slow = not policy.requests.allows(address)
        if slow or (scope["path"].startswith(policy.costly) and not policy.queries.allows(address)):
            return _refused(429, "too many requests; wait a moment", {"retry-after": "2"})
        if len(scope["raw_path"]) + len(scope["query_string"]) > MAX_URL:
            return _refused(414, f"the address is longer than {MAX_URL} bytes")
        announced = headers.get("content-length", "0")
        if not announced.isdecimal() or len(announced) > 18 or int(announced) > policy.max_body:
            return _refused(413, f"more than {policy.max_body // 2**20} MB")
        return None if policy.token is None else self._ask_for_token(scope, headers, policy.token)

    def _ask_for_token(self, scope: Scope, headers: Headers, token: str) -> Response | None:
        cookie = f"adaclip_{self.policy.port}"  # browsers give a cookie to all ports of a host
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = [value for name, value in query if name == "token"]
        if scope["path"] == "/" and _one_is(given, token):
            rest = urlencode([(name, value) for name, value in query if name != "token"])
            answer = RedirectResponse(f"/?{rest}" if rest else "/", 303)
            answer.set_cookie(cookie, token, httponly=True, samesite="lax")
            return answer
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        shown = bearer.strip() if scheme.lower() == "bearer" else HTTPConnection(scope).cookies.get(cookie, "")
        if _one_is([shown], token):
            return None
        return _refused(
            401,
            "the token is missing or wrong: open the address that the terminal shows",
            {"www-authenticate": "Bearer"},
        )


def _same_site(scope: Scope, headers: Headers, host: str) -> bool:
    """Whether our own page asks, or no page at all. A link from elsewhere may open the page itself."""
    origin = headers.get("origin")
    if origin is not None and origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
        return False
    opened = scope["path"] == "/" and headers.get("sec-fetch-mode") == "navigate" and scope["method"] == "GET"
    return opened or headers.get("sec-fetch-site", "none") in ("same-origin", "none")


def _one_is(given: Iterable[str], token: str) -> bool:
    """In a time that does not tell how much of it was right."""
    return any(hmac.compare_digest(one.encode(), token.encode()) for one in given)


def _refused(status: int, detail: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"detail": detail}, status, headers)


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.update(_HEADERS)
            headers.setdefault("cache-control", "no-store")
        await send(message)

    return sending
