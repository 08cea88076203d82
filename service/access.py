"""Who may ask what: one rule for each route, and the middlewares that keep them."""

import base64
import binascii
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from aiolimiter import AsyncLimiter
from fastapi import Request
from starlette.responses import Response
from starlette.routing import compile_path
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import ForbiddenError, RateLimitedError, UnauthenticatedError
from service.keys import Key, KeyRing, Role, includes
from service.logs import note
from service.middleware import ROUTE_KEY, first_header
from service.problems import KINDS, problem
from service.schemas import problem_responses

# Key of the scope that has the `Access` of a request.
SCOPE_KEY = "passerby.access"
BEARER = "Bearer"
# On it browsers ask for a name and a password. Only for pages: what a browser sends by itself to
# every page of ours, a page of somebody else could have it send, too.
BASIC = 'Basic realm="Passerby: any name, and a key as the password", charset="UTF-8"'


@dataclass(frozen=True, slots=True)
class Rule:
    """Who may use a route, and how the audit trail calls it.

    Args:
        role: What a key needs at least; None for a route that is open to all.
        action: Its word in the audit trail; None for what says nothing of anybody.
        is_page: A browser opens it, and has to be asked for a key.
    """

    role: Role | None
    action: str | None = None
    is_page: bool = False


_OPEN, _STATUS, _PAGE = Rule(None), Rule("read"), Rule("read", is_page=True)
RULES: Mapping[tuple[str, str], Rule] = {
    ("GET", "/livez"): _OPEN,
    ("GET", "/readyz"): _OPEN,
    ("GET", "/info"): _STATUS,
    ("GET", "/metrics"): _STATUS,
    ("GET", "/"): _PAGE,
    ("GET", "/docs"): _PAGE,
    ("GET", "/docs/swagger-ui-bundle.js"): _PAGE,
    ("GET", "/docs/swagger-ui.css"): _PAGE,
    ("GET", "/docs/redoc.standalone.js"): _PAGE,
    ("GET", "/docs/favicon.png"): _PAGE,
    ("GET", "/redoc"): _PAGE,
    ("GET", "/openapi.json"): _PAGE,
    ("POST", "/query"): Rule("read", "query"),
    ("POST", "/verify"): Rule("read", "verify"),
    ("POST", "/embed"): Rule("read", "embed"),
    ("GET", "/gallery"): Rule("read", "list-tracklets"),
    ("GET", "/gallery/{tracklet_id}"): Rule("read", "read-tracklet"),
    ("GET", "/gallery/{tracklet_id}/strip.jpg"): Rule("read", "look-at-tracklet"),
    ("GET", "/gallery/{tracklet_id}/matches"): Rule("read", "match-tracklet"),
    ("GET", "/identities"): Rule("read", "list-identities"),
    ("GET", "/identities/{identity}"): Rule("read", "read-identity"),
    ("POST", "/gallery"): Rule("write", "enrol"),
    ("PATCH", "/gallery/{tracklet_id}"): Rule("write", "change-tracklet"),
    ("DELETE", "/gallery/{tracklet_id}"): Rule("write", "erase-tracklet"),
    ("POST", "/identities/{identity}/tracklets"): Rule("write", "assign-tracklets"),
    # Whoever may name tracklets one by one may do so to all of an identity.
    ("PATCH", "/identities/{identity}"): Rule("write", "rename-identity"),
    ("POST", "/identities/{identity}/merge"): Rule("write", "merge-identity"),
    # A ban in the ledger of erasures, which outlives backups: more than to remove tracklets.
    ("DELETE", "/identities/{identity}"): Rule("admin", "erase-identity"),
}
# What is not there, or not by this method: only who has a key hears so.
UNKNOWN_RULE = Rule("read")
_TEMPLATES = tuple((method, compile_path(path)[0], path) for method, path in RULES if "{" in path)


@dataclass(frozen=True, slots=True)
class Access:
    """Who asks, and for what.

    Args:
        key: Theirs; None where the service asks for none.
        route: Template of the path, like ``/gallery/{tracklet_id}``; None where no rule has it.
        rule: Of the route.
        about: What stands in the path in place of the template's names.
    """

    key: Key | None
    route: str | None
    rule: Rule
    about: Mapping[str, str] = field(default_factory=dict)


def find_rule(method: str, path: str) -> tuple[str | None, Rule]:
    """The route that a request is for, and its rule; `UNKNOWN_RULE` where none has it."""
    route, rule, _ = _find(method, path)
    return route, rule


def _find(method: str, path: str) -> tuple[str | None, Rule, Mapping[str, str]]:
    """Likewise, and what stands in the path in place of the template's names."""
    method = "GET" if method == "HEAD" else method
    rule = RULES.get((method, path))
    if rule is not None and "{" not in path:
        return path, rule, {}
    for needed, pattern, template in _TEMPLATES:
        if needed == method and (match := pattern.match(path)):
            return template, RULES[method, template], match.groupdict()
    return None, UNKNOWN_RULE, {}


async def check_rule(request: Request) -> None:
    """Let a request through to the route that its rule was for, as a dependency of every route.

    Raises:
        ForbiddenError: The route has no rule, or the request came to it by another one's.
    """
    access: Access | None = request.scope.get(SCOPE_KEY)
    if access is None or access.route != getattr(request.scope.get("route"), "path", None):
        raise ForbiddenError("expected a route that somebody may use, got one without a rule")


class KeyMiddleware:
    """Lets in only who carries a key that opens, and not too often; the probes are open.

    Args:
        app: What is behind it.
        keys: The service's; none are asked for until there is one.
        per_minute: Requests a minute with one key, all of them at once or spread; None for any
            number. Where no key is needed, all who come count as one.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing, per_minute: int | None = None) -> None:
        self._app = app
        self._keys = keys
        self._per_minute = per_minute
        self._limiters: dict[str, AsyncLimiter] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route, rule, about = _find(scope["method"], scope["path"])
        scope[ROUTE_KEY] = route
        key = None
        if rule.role is not None:
            if self._keys.is_closed:
                key, lack = self._identify(scope, rule)
                if key is None:
                    await _ask_for_key(scope, rule, lack)(scope, receive, send)
                    return
                note(key_label=key.label)
            if self._per_minute is not None and not await self._admits(key, self._per_minute):
                await _too_many(self._per_minute)(scope, receive, send)
                return
        scope[SCOPE_KEY] = Access(key, route, rule, about)
        await self._app(scope, receive, send)

    def _identify(self, scope: Scope, rule: Rule) -> tuple[Key | None, str]:
        """The key that a request carries, or what it carries instead."""
        secret = _secret(scope, rule)
        if not secret:
            return None, "none"
        key = self._keys.find(secret)
        if key is None:
            return None, "an unknown one"
        state = key.state(datetime.now(UTC))
        # Only who has the key hears this.
        told = {"open": "", "expired": "one that has expired", "revoked": "one that was revoked"}
        return (key if state == "open" else None), told[state]

    async def _admits(self, key: Key | None, per_minute: int) -> bool:
        name = "" if key is None else key.key_id
        limiter = self._limiters.setdefault(name, AsyncLimiter(per_minute, 60))
        if not limiter.has_capacity():
            return False
        await limiter.acquire()  # at once
        return True


def _secret(scope: Scope, rule: Rule) -> bytes:
    """The key in a request's headers; empty where none is."""
    scheme, _, rest = first_header(scope, b"authorization").partition(b" ")
    if scheme.lower() == b"bearer":
        return rest.strip()
    if found := first_header(scope, b"x-api-key").strip():
        return found
    if rule.is_page and scheme.lower() == b"basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).partition(b":")[2].strip()
        except (binascii.Error, ValueError):
            return b""
    return b""


def _ask_for_key(scope: Scope, rule: Rule, lack: str) -> Response:
    is_browser = rule.is_page and b"text/html" in first_header(scope, b"accept")
    return problem(
        KINDS[UnauthenticatedError],
        f"expected a key of this service in Authorization: Bearer or X-API-Key, got {lack}",
        headers={"WWW-Authenticate": BASIC if is_browser else BEARER},
    )


def _too_many(per_minute: int) -> Response:
    detail = f"expected at most {per_minute} requests a minute with one key, got more"
    # So long until the bucket has leaked one request's worth.
    headers = {"Retry-After": str(math.ceil(60 / per_minute))}
    answer = problem(KINDS[RateLimitedError], detail, headers=headers)
    note(problem="rate-limited")  # or it would count as a service that has too much to do
    return answer


class RoleMiddleware:
    """Refuses what a key's role does not reach; behind the audit trail, which tells of it.

    Args:
        app: What is behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (ASGI)."""
        access: Access | None = scope.get(SCOPE_KEY)
        if access is None or access.key is None or access.rule.role is None:
            await self._app(scope, receive, send)
            return
        if includes(access.key.role, access.rule.role):
            await self._app(scope, receive, send)
            return
        detail = f"expected a key with role {access.rule.role}, got one with {access.key.role}"
        await problem(KINDS[ForbiddenError], detail)(scope, receive, send)


_SCHEMES: dict[str, Any] = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "A key, as a bearer token."},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "A key."},
}


def describe_access(schema: dict[str, Any], *, is_closed: bool) -> None:
    """Say in an OpenAPI description who may use what, and how it refuses the others.

    Args:
        schema: Of the whole app; it is changed.
        is_closed: Whether the service asks for keys.
    """
    if is_closed:
        schema.setdefault("components", {})["securitySchemes"] = _SCHEMES
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            rule = RULES.get((method.upper(), path))
            if rule is None or rule.role is None:
                continue
            statuses = [401, 429] if rule.role == "read" else [401, 403, 429]
            if rule.action is not None:
                statuses += [503, 507]  # where the audit trail cannot be written
            for status, response in problem_responses(*statuses).items():
                operation["responses"].setdefault(str(status), response)
            if is_closed:
                operation["security"] = [{name: []} for name in _SCHEMES]
                told = f"Needs a key with role {rule.role}."
                described = operation.get("description", "")
                if not described.endswith(told):  # a schema may come twice
                    operation["description"] = f"{described}\n\n{told}".strip()
