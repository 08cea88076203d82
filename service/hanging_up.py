"""A request goes on for as long as there is somebody to tell."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from fastapi import Request
from starlette.requests import ClientDisconnect

# Key of the scope's ``state`` for the connection's `HangUp`.
HANG_UP_STATE = "hang_up"
# A server that tells of a client again and again without news must not keep the loop busy.
_ASK_AGAIN_S = 0.05


class HangUp:
    """Tells who watches it that a connection has ended, at once and without a task for each."""

    def __init__(self) -> None:
        self._has_happened = False
        self._watchers: list[Callable[[], None]] = []

    def happen(self) -> None:
        """Tell them."""
        self._has_happened = True
        for watcher in tuple(self._watchers):
            watcher()

    @contextmanager
    def watched(self, watcher: Callable[[], None]) -> Iterator[None]:
        """Have somebody told within a block, at its beginning where it has happened before."""
        self._watchers.append(watcher)
        try:
            if self._has_happened:
                watcher()
            yield
        finally:
            self._watchers.remove(watcher)


@asynccontextmanager
async def while_connected(request: Request) -> AsyncIterator[None]:
    """Go on until the client hangs up.

    Args:
        request: With its body read.

    Raises:
        ClientDisconnect: The client has hung up; what was awaited has been cancelled.
    """
    task = asyncio.current_task()
    has_hung_up = False

    def cancel() -> None:
        nonlocal has_hung_up
        if task is not None and not has_hung_up:
            has_hung_up = True
            task.cancel()

    try:
        with _watching(request, cancel):
            yield
    except asyncio.CancelledError:
        if task is not None and has_hung_up and not task.uncancel():
            raise ClientDisconnect from None
        raise  # whoever awaits this was cancelled


@contextmanager
def _watching(request: Request, watcher: Callable[[], None]) -> Iterator[None]:
    hang_up: HangUp | None = request.scope.get("state", {}).get(HANG_UP_STATE)
    if hang_up is not None:
        with hang_up.watched(watcher):
            yield
        return
    # Another server than `service.server`'s: ask it.
    ended = False

    def tell(asked: "asyncio.Task[None]") -> None:
        if not ended and not asked.cancelled():
            watcher()

    asking = asyncio.ensure_future(_ask(request))
    asking.add_done_callback(tell)
    try:
        yield
    finally:
        ended = True
        asking.cancel()


async def _ask(request: Request) -> None:
    """Return when the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        await asyncio.sleep(_ASK_AGAIN_S)
