"""Ask who a tracklet shows, or take its embedding along."""

from typing import Annotated

from fastapi import APIRouter, Query, Request

from index.ranking import decide
from model.embedder import TrackletEmbedding
from service.attention import to_contract_grid
from service.parts import PartsDep, Upload, embed, frame_counts, receive_bare, search
from service.schemas import (
    AttentionBody,
    EmbedBody,
    MatchBody,
    NoParameters,
    QueryBody,
    QueryParameters,
    RecordBody,
    TimingBody,
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
    upload = await receive_bare(request, parts)
    embedded = await embed(request, parts, upload, with_attention=parameters.explain)
    found = await search(
        parts,
        upload,
        embedded,
        top_k=parameters.top_k,
        group_by=parameters.group_by,
        filters=parameters.filters(),
        max_distance=parameters.max_distance,
    )
    threshold = parts.settings.threshold
    decision = decide(found.nearest, threshold)
    parts.metrics.observe_decision(found.nearest, decision)
    body = QueryBody(
        matches=[
            MatchBody(
                rank=rank,
                identity=match.record.identity,
                distance=match.distance,
                tracklet=RecordBody.of(match.record),
            )
            for rank, match in enumerate(found.matches, start=1)
        ],
        decision=decision,
        threshold=threshold,
        searched=found.searched,
        model=parts.embedder.model,
        frames=frame_counts(upload.tracklet),
        timing_ms=TimingBody(**upload.timing.body()),
    )
    if parameters.explain:
        body.attention = _attention(upload, embedded.result)
    return body


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
        timing_ms=TimingBody(**upload.timing.body()),
    )
