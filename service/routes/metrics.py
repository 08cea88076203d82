"""What the service counts and times, for Prometheus to fetch."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response

from service.metrics import OPENMETRICS, PLAIN, Metrics
from service.readiness import Readiness
from service.schemas import problem_responses

router = APIRouter(tags=["status"])
_EXAMPLE = """# HELP passerby_requests_total Answered requests.
# TYPE passerby_requests_total counter
passerby_requests_total{route="/query",status="200"} 118.0
passerby_requests_total{route="/query",status="429"} 3.0
# HELP passerby_queue_tracklets Tracklets that wait for the worker.
# TYPE passerby_queue_tracklets gauge
passerby_queue_tracklets 2.0
"""
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Prometheus' text format; OpenMetrics for who asks for it.",
        "content": {
            kind.partition(";")[0]: {"schema": {"type": "string"}, "example": _EXAMPLE + end}
            for kind, end in ((PLAIN, ""), (OPENMETRICS, "# EOF\n"))
        },
    },
    **problem_responses(401),
}


@router.get("/metrics", response_class=Response, responses=_RESPONSES)
async def get_metrics(request: Request) -> Response:
    """Read every metric; it needs a key where keys are set."""
    # In a thread: the gallery is asked how much it holds, and may be busy. Not in one of those that
    # routes share, which may all wait for a disk that hangs.
    metrics: Metrics = request.app.state.parts.metrics
    readiness: Readiness = request.app.state.readiness
    metrics.tell_readiness(await readiness.ask())
    accept = request.headers.get("accept", "")
    text, media_type = await asyncio.to_thread(metrics.expose, accept)
    return Response(text, media_type=media_type)
