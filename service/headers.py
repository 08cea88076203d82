"""What browsers are told about every answer: what it is, who may show it, who may keep it."""

import base64
import hashlib
import re
from collections.abc import Mapping
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import InvalidRequestError
from service.problems import KINDS, problem

# An answer is data: whatever a browser takes it for, nothing in it is to be run, loaded or framed.
DATA_POLICY = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
HEADERS: Mapping[str, str] = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Nearly every answer is about somebody, and the others are short.
    "Cache-Control": "no-store",
}
POLICY = b"content-security-policy"
# For pages of other origins, where the settings name them.
CORS_METHODS = ("GET", "POST", "PATCH", "DELETE")
CORS_REQUEST_HEADERS = ("Authorization", "Content-Type", "X-API-Key", "X-Request-ID")
CORS_ANSWER_HEADERS = ("Location", "Retry-After", "X-Request-ID")
_SCRIPT = re.compile(r"<script([^>]*)>(.*?)</script>", re.DOTALL)
_FILE = re.compile(r"\bsrc=")
_NONE = "'none'"


class CrossOriginMiddleware(CORSMiddleware):
    """Starlette's, with a problem for what is refused."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer a browser that asks what it may send (Fetch, section 4.8)."""
        answer = super().preflight_response(request_headers)
        if answer.status_code == HTTPStatus.OK:
            return answer
        allowed = {k: v for k, v in answer.headers.items() if not k.startswith("content-")}
        detail = "expected an origin, a method and headers that are allowed, got others"
        return problem(KINDS[InvalidRequestError], detail, headers=allowed)


class HeadersMiddleware:
    """Adds security headers to each answer, where it does not say otherwise itself.

    Args:
        app: What is behind it.
        policies: Content security policies by path, of pages that are more than data.
    """

    def __init__(self, app: ASGIApp, policies: Mapping[str, str]) -> None:
        self._app = app
        self._policies = {path: policy.encode() for path, policy in policies.items()}
        self._data_policy = DATA_POLICY.encode()
        self._headers = [(name.lower().encode(), text.encode()) for name, text in HEADERS.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        policy = self._policies.get(scope["path"], self._data_policy)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                said = list(message.get("headers", ()))
                names = {name.lower() for name, _ in said}
                added = [*self._headers, (POLICY, policy)]
                message["headers"] = said + [one for one in added if one[0] not in names]
            await send(message)

        await self._app(scope, receive, send_with_headers)


def policy_of(html: str) -> str:
    """The content security policy under which a page of ours works, and not much else.

    Args:
        html: The page. It must show nothing that a client sent, and load what it loads from here.
            Scripts written in it are named by their digest.
    """
    scripts = [
        "'self'" if _FILE.search(one) else _digest(text) for one, text in _SCRIPT.findall(html)
    ]
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {' '.join(dict.fromkeys(scripts)) or _NONE}",
            # What these pages' scripts draw is styled in place.
            "style-src 'self' 'unsafe-inline'",
            "img-src 'self' data:",
            "connect-src 'self'",
            "worker-src blob:",
            "frame-ancestors 'none'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )


def _digest(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
