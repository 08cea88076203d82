"""Going on for as long as there is somebody to tell."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import Request
from starlette.requests import ClientDisconnect

from service.hanging_up import HANG_UP_STATE, HangUp, while_connected

WAIT_S = 20


class Server:
    """One that tells of its connection through the scope's state, or through `receive`."""

    def __init__(self, *, by_state: bool) -> None:
        self.hang_up = HangUp()
        self._gone = asyncio.Event()
        state = {HANG_UP_STATE: self.hang_up} if by_state else {}
        self.request = Request({"type": "http", "state": state}, self._receive)

    async def _receive(self) -> dict[str, Any]:
        await self._gone.wait()
        return {"type": "http.disconnect"}

    def lose(self) -> None:
        self.hang_up.happen()
        self._gone.set()


Start = Callable[[], Server]


@pytest.fixture(params=[True, False], ids=["state", "receive"])
def start(request: pytest.FixtureRequest) -> Start:
    """Makes a server within a loop."""
    return lambda: Server(by_state=request.param)


def test_what_is_awaited_is_cancelled_when_the_client_hangs_up(start: Start) -> None:
    async def ask() -> None:
        server = start()
        never = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(server.lose)
        with pytest.raises(ClientDisconnect):
            async with asyncio.timeout(WAIT_S), while_connected(server.request):
                await never
        assert never.cancelled()

    asyncio.run(ask())


def test_a_client_that_has_gone_before_is_noticed(start: Start) -> None:
    async def ask() -> None:
        server = start()
        server.lose()
        with pytest.raises(ClientDisconnect):
            async with asyncio.timeout(WAIT_S), while_connected(server.request):
                await asyncio.Event().wait()

    asyncio.run(ask())


def test_a_client_that_goes_after_the_block_cancels_nothing(start: Start) -> None:
    async def ask() -> str:
        server = start()
        async with while_connected(server.request):
            await asyncio.sleep(0)
        server.lose()
        await asyncio.sleep(0.01)
        return "went on"

    assert asyncio.run(ask()) == "went on"


def test_who_is_cancelled_by_somebody_else_stays_cancelled(start: Start) -> None:
    async def wait(server: Server) -> None:
        async with while_connected(server.request):
            await asyncio.Event().wait()

    async def ask() -> None:
        task = asyncio.create_task(wait(start()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(ask())


def test_an_error_within_the_block_is_itself(start: Start) -> None:
    async def ask() -> None:
        with pytest.raises(KeyError):
            async with while_connected(start().request):
                raise KeyError

    asyncio.run(ask())
