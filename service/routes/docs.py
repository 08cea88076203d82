"""The pages that show the description of this API, with all that they load."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from starlette.responses import FileResponse, HTMLResponse

router = APIRouter(include_in_schema=False)
# The packages' own folder of static files: a network of cameras has no way to a delivery network.
PACKAGE = "fastapi_offline"
KINDS: Mapping[str, str] = {".js": "text/javascript", ".css": "text/css", ".png": "image/png"}
# They hold nothing of anybody, and change with a release alone.
CACHE = "private, max-age=3600"
_ICON = "/docs/favicon.png"
_OPENAPI = "/openapi.json"
_TITLE = "Passerby"


def swagger_page() -> HTMLResponse:
    """The description, to read and to try."""
    return get_swagger_ui_html(
        openapi_url=_OPENAPI,
        title=f"{_TITLE} - Swagger UI",
        swagger_js_url="/docs/swagger-ui-bundle.js",
        swagger_css_url="/docs/swagger-ui.css",
        swagger_favicon_url=_ICON,
    )


def redoc_page() -> HTMLResponse:
    """The description, to read."""
    return get_redoc_html(
        openapi_url=_OPENAPI,
        title=f"{_TITLE} - ReDoc",
        redoc_js_url="/docs/redoc.standalone.js",
        redoc_favicon_url=_ICON,
        with_google_fonts=False,
    )


@router.get("/docs")
async def show_swagger() -> HTMLResponse:
    """Show the description, to read and to try."""
    return swagger_page()


@router.get("/redoc")
async def show_redoc() -> HTMLResponse:
    """Show the description, to read."""
    return redoc_page()


@router.get("/docs/swagger-ui-bundle.js")
@router.get("/docs/swagger-ui.css")
@router.get("/docs/redoc.standalone.js")
@router.get(_ICON)
async def send_asset(request: Request) -> FileResponse:
    """Send a file that a page loads, one of those that are routes."""
    name = Path(request.url.path).name
    return FileResponse(
        Path(str(resources.files(PACKAGE))) / "static" / name,
        media_type=KINDS[Path(name).suffix],  # what the machine says of an ending may be wrong
        headers={"Cache-Control": CACHE},
    )


def page_contents() -> dict[str, str]:
    """What stands in each page, by its path."""
    pages = {"/docs": swagger_page(), "/redoc": redoc_page()}
    return {path: bytes(page.body).decode() for path, page in pages.items()}
