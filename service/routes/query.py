"""Ask who a tracklet shows, or take its embedding along."""

from typing import Annotated

import numpy as np
from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool

from index.gallery import Embeddings, Gallery, TrackletRecord
from index.ranking import decide
from model.embedder import TrackletEmbedding
from service.attention import to_contract_grid
from service.auditing import tell
from service.parts import (
    PAIR_PREFIXES,
    Found,
    Parts,
    PartsDep,
    Timing,
    Upload,
    embed,
    embed_all,
    frame_counts,
    quality_of,
    receive_bare,
    receive_pair,
    search,
    threshold_of,
)
from service.routes.gallery import TrackletId
from service.schemas import (
    AttentionBody,
    EmbedBody,
    FrameCounts,
    MatchBody,
    NoParameters,
    QualityBody,
    QueryBody,
    QueryParameters,
    RecordBody,
    SearchParameters,
    SideBody,
    TimingBody,
    VerifyBody,
    problem_responses,
    upload_body,
)

router = APIRouter(tags=["query"])


@router.post(
    "/query",
    openapi_extra=upload_body(),
    response_model_exclude_unset=True,
    responses=problem_responses(400, 401, 409, 413, 415, 422, 429, 503, 504),
)
async def query(
    request: Request, parts: PartsDep, parameters: Annotated[QueryParameters, Query()]
) -> QueryBody:
    """Find the identities of the gallery that look most like the person in the tracklet."""
    upload = await receive_bare(request, parts, last=parts.searches)
    embedded = await embed(request, parts, upload, with_attention=parameters.explain)
    found = await search(
        parts,
        upload.timing,
        embedded.result.embedding,
        top_k=parameters.top_k,
        group_by=parameters.group_by,
        filters=parameters.filters(),
        max_distance=parameters.max_distance,
    )
    seen = frame_counts(upload.tracklet), quality_of(upload, embedded)
    body = _answer(parts, found, upload.timing, *seen)
    if parameters.explain:
        body.attention = _attention(upload, embedded.result)
    return body


@router.get(
    "/gallery/{tracklet_id}/matches",
    response_model_exclude_unset=True,
    responses=problem_responses(401, 404, 409, 422, 429, 503),
)
async def get_matches(
    parts: PartsDep,
    tracklet_id: TrackletId,
    parameters: Annotated[SearchParameters, Query()],
) -> QueryBody:
    """Find the identities that look most like a stored tracklet, which is itself left out."""
    parts.check_not_stopping()
    timing = Timing()
    record, embedding = await run_in_threadpool(_stored, parts.gallery, tracklet_id)
    found = await search(
        parts,
        timing,
        embedding,
        top_k=parameters.top_k,
        group_by=parameters.group_by,
        filters=parameters.filters(exclude_tracklets=frozenset({tracklet_id})),
        max_distance=parameters.max_distance,
    )
    stored = RecordBody.of(record)
    return _answer(parts, found, timing, stored.frames, stored.quality)


def _stored(gallery: Gallery, tracklet_id: str) -> tuple[TrackletRecord, Embeddings]:
    return gallery.get(tracklet_id), gallery.embedding(tracklet_id)


def _answer(
    parts: Parts, found: Found, timing: Timing, frames: FrameCounts, quality: QualityBody | None
) -> QueryBody:
    """The body of a search, without attention; counts the decision."""
    result, threshold = found
    decision = decide(result.nearest, threshold)
    parts.metrics.observe_decision(result.nearest, decision)
    best = result.matches[0].record if result.matches else None
    # The first alone: whom the answer names besides, only who asks for them goes on to look at.
    tell(
        best_tracklet=None if best is None else best.tracklet_id,
        best_identity=None if best is None else best.identity,
        count=len(result.matches),
        decision=decision,
    )
    return QueryBody(
        matches=[
            MatchBody(
                rank=rank,
                identity=match.record.identity,
                distance=match.distance,
                tracklet=RecordBody.of(match.record),
            )
            for rank, match in enumerate(result.matches, start=1)
        ],
        decision=decision,
        threshold=threshold,
        searched=result.searched,
        model=parts.embedder.model,
        frames=frames,
        quality=quality,
        timing_ms=TimingBody(**timing.body()),
    )


@router.post(
    "/verify",
    openapi_extra=upload_body(prefixes=PAIR_PREFIXES),
    responses=problem_responses(400, 401, 413, 415, 422, 429, 503, 504),
)
async def verify(
    request: Request, parts: PartsDep, _: Annotated[NoParameters, Query()]
) -> VerifyBody:
    """Say whether two tracklets show the same person, without storing either."""
    uploads = await receive_pair(request, parts)
    embedded = await embed_all(request, parts, uploads)
    one, other = (each.result.embedding for each in embedded)
    distance = float(np.linalg.norm(one - other))
    threshold = await run_in_threadpool(threshold_of, parts)
    a, b = (
        SideBody(frames=frame_counts(upload.tracklet), quality=quality_of(upload, each))
        for upload, each in zip(uploads, embedded, strict=True)
    )
    decision = decide(distance, threshold)
    tell(decision=decision)
    return VerifyBody(
        distance=distance,
        same=None if decision is None else decision == "match",
        threshold=threshold,
        model=parts.embedder.model,
        a=a,
        b=b,
        timing_ms=TimingBody(**uploads[0].timing.body()),
    )


def _attention(upload: Upload, result: TrackletEmbedding) -> list[AttentionBody]:
    maps = [] if result.attention is None else to_contract_grid(result.attention).tolist()
    return [
        AttentionBody(frame=position, map=rows)
        for position, rows in zip(upload.tracklet.positions, maps, strict=True)
    ]


@router.post(
    "/embed",
    openapi_extra=upload_body(),
    responses=problem_responses(400, 401, 413, 415, 422, 429, 503, 504),
)
async def embed_tracklet(
    request: Request, parts: PartsDep, _: Annotated[NoParameters, Query()]
) -> EmbedBody:
    """Embed a tracklet without storing it."""
    upload = await receive_bare(request, parts)
    embedded = await embed(request, parts, upload)
    return EmbedBody(
        embedding=embedded.result.embedding.tolist(),
        dim=parts.embedder.dim,
        model=parts.embedder.model,
        frames=frame_counts(upload.tracklet),
        quality=quality_of(upload, embedded),
        timing_ms=TimingBody(**upload.timing.body()),
    )
