"""What parts log in threads of their own names the request that it was for."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service.audit import Trail
from service.logs import request_id
from service.readiness import _in_thread


def within_a_request(act: Callable[[], object]) -> None:
    token = request_id.set("one")
    try:
        act()
    finally:
        request_id.reset(token)


def test_a_line_of_the_trail_is_written_on_behalf_of_its_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trail = Trail(tmp_path / "audit")
    noted: list[str | None] = []
    monkeypatch.setattr(trail, "append", lambda _: noted.append(request_id.get()))

    within_a_request(lambda: asyncio.run(trail.write({"action": "query"})))
    within_a_request(lambda: trail.write_later({"action": "query"}))
    trail.close()

    assert noted == ["one", "one"]


def test_a_part_is_asked_how_it_is_on_behalf_of_the_probe() -> None:
    noted: list[str | None] = []

    async def ask() -> None:
        await _in_thread(thread, lambda: noted.append(request_id.get()))()

    with ThreadPoolExecutor(1) as thread:
        within_a_request(lambda: asyncio.run(ask()))

    assert noted == ["one"]
