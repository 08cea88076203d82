"""Identities: who the stored tracklets show. They are corrected here; tracklets make them."""

from typing import Annotated

from fastapi import APIRouter, Path, Query

from service.audit import IDS_A_LINE
from service.auditing import tell
from service.errors import ValidationError
from service.parts import PartsDep, change
from service.schemas import (
    ID_PATTERN,
    AssignBody,
    AssignedBody,
    ErasedBody,
    IdentitiesBody,
    IdentityBody,
    MergeBody,
    NoParameters,
    PageParameters,
    RenameBody,
    problem_responses,
)

router = APIRouter(tags=["identities"])
Identity = Annotated[str, Path(pattern=ID_PATTERN)]
_CHANGES = problem_responses(400, 401, 404, 413, 422, 429, 503, 504, 507)


@router.get("/identities", responses=problem_responses(400, 401, 422, 503))
def list_identities(
    parts: PartsDep, parameters: Annotated[PageParameters, Query()]
) -> IdentitiesBody:
    """List identities, a page at a time, in the order of their names."""
    page = parts.gallery.identities(limit=parameters.limit, cursor=parameters.cursor)
    tell(count=len(page.items))
    return IdentitiesBody(
        items=[IdentityBody.of(one) for one in page.items], next_cursor=page.next_cursor
    )


@router.get("/identities/{identity}", responses=problem_responses(401, 404, 422, 503))
def get_identity(
    parts: PartsDep, identity: Identity, _: Annotated[NoParameters, Query()]
) -> IdentityBody:
    """Read what is known of one identity."""
    return IdentityBody.of(parts.gallery.identity(identity))


@router.patch("/identities/{identity}", responses={**_CHANGES, **problem_responses(409)})
async def rename_identity(parts: PartsDep, identity: Identity, body: RenameBody) -> IdentityBody:
    """Give an identity another name; onto one that exists it is refused, that is a merge."""
    tell(into=body.identity)
    renamed = await change(parts, parts.gallery.rename_identity, identity, body.identity)
    return IdentityBody.of(renamed)


@router.post("/identities/{identity}/merge", responses=_CHANGES)
async def merge_identity(parts: PartsDep, identity: Identity, body: MergeBody) -> IdentityBody:
    """Make all tracklets of this identity those of another; answers the other."""
    tell(into=body.into)
    if body.into == identity:
        raise ValidationError("expected another identity to merge into, got the same", "/into")
    return IdentityBody.of(await change(parts, parts.gallery.merge_identity, identity, body.into))


@router.post("/identities/{identity}/tracklets", responses=_CHANGES)
async def assign_tracklets(parts: PartsDep, identity: Identity, body: AssignBody) -> AssignedBody:
    """Say that tracklets show this identity, all of them or none: names them, or splits others."""
    tell(tracklets=body.tracklet_ids)
    moved = await change(parts, parts.gallery.assign, body.tracklet_ids, identity)
    return AssignedBody(identity=identity, changed=moved)


@router.delete("/identities/{identity}", responses=problem_responses(401, 404, 422, 429, 503, 507))
async def delete_identity(
    parts: PartsDep, identity: Identity, _: Annotated[NoParameters, Query()]
) -> ErasedBody:
    """Erase an identity with all its tracklets, their embeddings and strips."""
    erased = await change(parts, parts.gallery.remove_identity, identity)
    tell(count=len(erased.tracklet_ids), tracklets=list(erased.tracklet_ids[:IDS_A_LINE]))
    return ErasedBody(identity=erased.identity, tracklets=list(erased.tracklet_ids))
