"""Stored tracklets: enrol, list, read, change, erase."""

import hashlib
import json
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError as PydanticError
from starlette.concurrency import run_in_threadpool

from index.gallery import DuplicateTrackletError, Enrolment, Gallery, NotFoundError, TrackletRecord
from service.auditing import tell
from service.errors import AlreadyExistsError, PayloadTooLargeError, ValidationError
from service.ids import new_tracklet_id
from service.parts import (
    Parts,
    PartsDep,
    Upload,
    change,
    embed,
    quality_of,
    receive,
    write,
)
from service.schemas import (
    ID_PATTERN,
    EnrolFields,
    ListParameters,
    NoParameters,
    PageBody,
    PatchBody,
    RecordBody,
    problem_responses,
    upload_body,
)
from service.settings import Settings
from service.uploads import Keep

router = APIRouter(tags=["gallery"])
TrackletId = Annotated[str, Path(pattern=ID_PATTERN)]


@router.post(
    "/gallery",
    status_code=201,
    openapi_extra=upload_body(with_fields=True),
    responses={
        200: {"model": RecordBody, "description": "It was there already, with the same content."},
        **problem_responses(400, 401, 409, 413, 415, 422, 429, 503, 504, 507),
    },
)
async def enrol(
    request: Request,
    response: Response,
    parts: PartsDep,
    _: Annotated[NoParameters, Query()],
) -> RecordBody:
    """Enrol a tracklet; it is stored and searchable when this answers."""
    upload = await receive(request, parts, last=parts.writes, keep=_kept(parts.settings))
    fields = _read_fields(upload.fields)
    tell(tracklet=fields.tracklet_id, identity=fields.identity)
    check_metadata(fields.metadata, parts)
    content = f"{upload.decoded.content}:{_fields_digest(fields)}"
    record = await run_in_threadpool(_stored, parts.gallery, fields.tracklet_id, content)
    if record is None:
        record, created = await _add(request, parts, upload, fields, content)
        response.status_code = 201 if created else 200
    else:
        response.status_code = 200
    response.headers["Location"] = f"/gallery/{record.tracklet_id}"
    return RecordBody.of(record)


async def _add(
    request: Request, parts: Parts, upload: Upload, fields: EnrolFields, content: str
) -> tuple[TrackletRecord, bool]:
    """Embed and store; False where another request stored the same id and content meanwhile."""
    embedded = await embed(request, parts, upload)
    record = TrackletRecord(
        tracklet_id=fields.tracklet_id or new_tracklet_id(),
        identity=fields.identity,
        camera=fields.camera,
        start_time=fields.start_time,
        end_time=fields.end_time,
        metadata=fields.metadata,
        frames_received=upload.tracklet.received,
        frames_used=len(upload.tracklet.positions),
        model=parts.embedder.model,
        created_at=datetime.now(UTC),
        content=content,
        expires_at=fields.expires_at,
        quality=quality_of(upload, embedded).model_dump(),
    )
    tell(tracklet=record.tracklet_id)
    kept = upload.decoded
    enrolment = Enrolment(record, embedded.result.embedding, kept.strip, kept.frames)
    try:
        await write(parts, parts.gallery.add, [enrolment])
    except DuplicateTrackletError:
        other = await run_in_threadpool(_stored, parts.gallery, record.tracklet_id, content)
        if other is None:  # added and erased again in between
            raise
        return other, False
    return record, True


def _kept(settings: Settings) -> Keep:
    """What is stored of an upload, besides its embedding."""
    strip = Keep.STRIP if settings.thumbnails else Keep.NOTHING
    return strip | (Keep.FRAMES if settings.keep_frames else Keep.NOTHING)


def _stored(gallery: Gallery, tracklet_id: str | None, content: str) -> TrackletRecord | None:
    """The record of an id with the same content; None where the id is free.

    Raises:
        AlreadyExistsError: The id is taken by other content.
    """
    if tracklet_id is None:
        return None
    try:
        record = gallery.get(tracklet_id)
    except NotFoundError:
        return None
    if record.content != content:
        raise AlreadyExistsError(
            f"expected a new tracklet id or the same content, got {tracklet_id} with other content"
        )
    return record


def _read_fields(fields: dict[str, str]) -> EnrolFields:
    try:
        return EnrolFields.model_validate(fields)
    except PydanticError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
        raise RequestValidationError(found) from error


def _fields_digest(fields: EnrolFields) -> str:
    # Without what was not given and older versions did not know: they have stored digests.
    left_out = {"expires_at"} if fields.expires_at is None else None
    canonical = json.dumps(fields.model_dump(mode="json", exclude=left_out), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def check_metadata(metadata: Any, parts: Parts) -> None:
    """Refuse metadata over the limit.

    Raises:
        PayloadTooLargeError: It is.
    """
    size = len(json.dumps(metadata, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    if size > (limit := parts.settings.limits.metadata_bytes):
        raise PayloadTooLargeError(f"expected metadata of at most {limit} bytes, got {size}")


@router.get("/gallery", responses=problem_responses(400, 401, 422, 503))
def list_tracklets(parts: PartsDep, parameters: Annotated[ListParameters, Query()]) -> PageBody:
    """List stored tracklets, a page at a time, in the order of enrolment."""
    page = parts.gallery.list(
        parameters.filters(), limit=parameters.limit, cursor=parameters.cursor
    )
    tell(identity=parameters.identity, count=len(page.records))
    return PageBody(
        items=[RecordBody.of(record) for record in page.records], next_cursor=page.next_cursor
    )


@router.get("/gallery/{tracklet_id}", responses=problem_responses(401, 404, 422, 503))
def get_tracklet(parts: PartsDep, tracklet_id: TrackletId) -> RecordBody:
    """Read one stored tracklet."""
    record = parts.gallery.get(tracklet_id)
    tell(identity=record.identity)
    return RecordBody.of(record)


@router.get(
    "/gallery/{tracklet_id}/strip.jpg",
    response_class=Response,
    responses={
        200: {"content": {"image/jpeg": {}}, "description": "At most 8 frames, 128 pixels high."},
        **problem_responses(401, 404, 422, 503),
    },
)
def get_strip(parts: PartsDep, tracklet_id: TrackletId) -> Response:
    """Look at one stored tracklet, where thumbnails are kept."""
    return Response(
        parts.gallery.strip(tracklet_id),
        media_type="image/jpeg",
        headers={"Cache-Control": "no-store"},  # people are in it
    )


@router.patch(
    "/gallery/{tracklet_id}",
    responses=problem_responses(400, 401, 404, 413, 422, 429, 503, 504, 507),
)
async def patch_tracklet(parts: PartsDep, tracklet_id: TrackletId, patch: PatchBody) -> RecordBody:
    """Change identity, camera, times, expiry or metadata of a stored tracklet; null removes."""
    return await change(parts, _patch, parts, tracklet_id, patch)


def _patch(parts: Parts, tracklet_id: str, patch: PatchBody) -> RecordBody:
    with parts.patching:
        record = parts.gallery.get(tracklet_id)
        try:
            changes = patch.changes(record)
        except ValueError as error:
            raise ValidationError(str(error), "/body") from error
        check_metadata(changes.get("metadata", {}), parts)
        tell(identity=record.identity, into=changes.get("identity"))
        return RecordBody.of(parts.gallery.update(tracklet_id, changes))


@router.delete(
    "/gallery/{tracklet_id}",
    status_code=204,
    responses=problem_responses(401, 404, 422, 429, 503, 507),
)
async def delete_tracklet(parts: PartsDep, tracklet_id: TrackletId) -> None:
    """Erase a stored tracklet with its embedding and its strip."""
    erased = await change(parts, parts.gallery.remove, tracklet_id)
    tell(identity=erased.identity)
