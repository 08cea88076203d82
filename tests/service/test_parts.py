"""What routes share: an upload that never ends must not keep its place."""

import asyncio
from collections.abc import MutableMapping
from typing import Any

from index.embedded import EmbeddedGallery
from service.app import create_app
from service.settings import LimitSettings, Settings
from tests.service.conftest import FakeEmbedder


def test_an_upload_that_stops_arriving_is_given_up(
    embedder: FakeEmbedder, gallery: EmbeddedGallery
) -> None:
    """It gets 504, and its place is free for the next."""
    settings = Settings(limits=LimitSettings(uploads=1, upload_s=0.2))
    app = create_app(embedder, gallery, settings)
    sent: list[MutableMapping[str, Any]] = []
    headers = [(b"content-type", b"multipart/form-data; boundary=q"), (b"expect", b"100-continue")]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/query",
        "query_string": b"",
        "headers": headers,
    }

    async def never() -> MutableMapping[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")

    async def keep(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def ask_twice() -> None:
        async with app.router.lifespan_context(app):
            await app(dict(scope), never, keep)
            await app(dict(scope), never, keep)

    asyncio.run(ask_twice())

    assert [one["status"] for one in sent if one["type"] == "http.response.start"] == [504, 504]
