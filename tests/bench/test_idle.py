"""The bench of idle connections: what it holds, and what it takes for a failure."""

import multiprocessing
import socket
import threading
from collections import Counter
from dataclasses import replace

import pytest

from bench.idle import KINDS, LIVEZ, Asked, Asker, Held, Round, hold, judge
from bench.serving import Usage
from tests.service.processes import eventually

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@pytest.fixture
def port() -> int:
    """Of a server that answers the first bytes of each connection; it closes every second one."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)

    def serve() -> None:
        held: list[socket.socket] = []
        for number in range(1000):
            accepted, _ = listener.accept()
            if accepted.recv(1000):
                accepted.sendall(ANSWER)
            if number % 2:
                accepted.close()
                held.pop().close()
            else:
                held.append(accepted)

    threading.Thread(target=serve, daemon=True).start()
    found: int = listener.getsockname()[1]
    return found


def test_connections_are_held_until_the_server_closes_them(port: int) -> None:
    reader, writer = multiprocessing.get_context("spawn").Pipe(duplex=False)

    hold(port, LIVEZ, 10, "127.0.0.2", writer)

    held: Held = reader.recv()
    assert held.statuses == Counter({200: 10})
    assert len(held.held_s) == 10


def test_who_asks_counts_answers_and_failures(port: int) -> None:
    asker = Asker(port, lambda: LIVEZ, is_kept=False, pause_s=0.001)
    asker.start()
    assert eventually(lambda: asker.asked.statuses[200] > 3)

    asked = asker.stop()

    assert asked.statuses.keys() == {200}
    assert len(asked.latency_s) == asked.statuses.total()


USAGE = Usage(rss=100, children_rss=(), threads=1, descriptors=10, sockets=5, cpu_s=0.0)


def rounds() -> list[Round]:
    """A round without idle connections and one of each kind, all as it should be."""
    asked = {name: Asked([0.1], Counter({200: 1}), 0.1) for name in ("/livez", "query")}
    asked["query, kept"] = Asked([0.1], Counter({200: 1}), 0.1)
    held = Held(1.0, (5.0, 10.0), Counter({0: 2}))
    return [Round(kind, held, dict(asked), USAGE, USAGE) for kind in ("none", *KINDS)]


def failed(seen: list[Round]) -> list[str]:
    return [claim.text for claim in judge(seen, within_s=25) if not claim.holds]


def test_idle_connections_that_bother_nobody_pass() -> None:
    assert failed(rounds()) == []


@pytest.mark.parametrize(
    ("changes", "claim"),
    [
        ({"held": Held(1.0, (26.0,), Counter())}, "all are let go"),
        ({"after": replace(USAGE, sockets=6)}, "no socket is left"),
        ({"after": replace(USAGE, rss=140)}, "memory"),
    ],
)
def test_what_is_left_over_fails(changes: dict[str, object], claim: str) -> None:
    *first, last = rounds()

    [found] = failed([*first, replace(last, **changes)])  # type: ignore[arg-type]

    assert found.startswith(claim)


@pytest.mark.parametrize(
    ("name", "asked", "claim"),
    [
        ("/livez", Asked([0.1], Counter({200: 9, 0: 1})), "/livez hears"),
        ("/livez", Asked([0.1], Counter({200: 9, 429: 1}), 6.0), "/livez is not kept out"),
        ("query", Asked([0.1], Counter({503: 1})), "a query hears"),
        ("query, kept", Asked([0.1], Counter({429: 1}), 21.0), "nobody is kept out"),
    ],
)
def test_others_who_are_not_answered_fail(name: str, asked: Asked, claim: str) -> None:
    *first, last = rounds()

    [found] = failed([*first, replace(last, asked={**last.asked, name: asked})])

    assert found.startswith(claim)
