"""How the service is, and what it is."""

from importlib.metadata import version
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import RedirectResponse

from service.errors import NotReadyError
from service.parts import PartsDep
from service.readiness import Readiness
from service.schemas import Body, problem_responses

router = APIRouter(tags=["status"])


class InfoBody(Body):
    """What runs here, how much it holds and what it takes."""

    version: str
    model: dict[str, Any]
    gallery: dict[str, Any]
    limits: dict[str, Any]
    threshold: float | None = Field(description="Greatest distance that is a match.")
    calibration: dict[str, Any] | None = Field(
        description="Where the threshold comes from; null where it is a setting, or none is set."
    )
    retention_days: float | None
    frames_per_tracklet: int
    sampling: str


class ReadyBody(Body):
    """Every part that was asked, and its answer."""

    ready: Literal[True] = True
    checks: dict[str, str]


@router.get("/info", responses=problem_responses(401, 503))
def info(parts: PartsDep) -> InfoBody:
    """Version, model, gallery and limits."""
    settings = parts.settings
    counts = parts.gallery.counts()
    calibration = None if settings.threshold is not None else parts.gallery.calibration()
    return InfoBody(
        version=version("passerby"),
        model=parts.embedder.describe(),
        gallery={
            "tracklets": counts.tracklets,
            "identities": counts.identities,
            "model": parts.gallery.model,
            "index": settings.index,
        },
        limits={**settings.limits.model_dump(), "queue": settings.queue.model_dump()},
        threshold=settings.threshold if calibration is None else calibration.threshold,
        calibration=None if calibration is None else calibration.to_dict(),
        retention_days=settings.retention_days,
        frames_per_tracklet=settings.frames_per_tracklet,
        sampling=settings.sampling,
    )


@router.get("/livez")
@router.head("/livez", include_in_schema=False)  # some probes ask so
async def livez() -> dict[str, str]:
    """Answer as long as the event loop turns."""
    return {"status": "alive"}


@router.get("/readyz", responses=problem_responses(503))
@router.head("/readyz", include_in_schema=False)  # some probes ask so
async def readyz(request: Request) -> ReadyBody:
    """Ask every part whether it can do its work."""
    readiness: Readiness = request.app.state.readiness
    checks = await readiness.ask()
    failed = [f"{name}: {answer}" for name, answer in checks.items() if answer != "ok"]
    if failed:
        raise NotReadyError("; ".join(failed))
    return ReadyBody(checks=checks)


@router.get("/", include_in_schema=False)
async def root() -> RedirectResponse:
    """Send a browser to the documentation."""
    return RedirectResponse("/docs")
