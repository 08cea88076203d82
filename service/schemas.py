"""Request and response bodies, with the examples that the documentation shows."""

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)
from pydantic import ValidationError as PydanticError
from pydantic_core import PydanticCustomError

from index.gallery import Filters, GroupBy, IdentitySummary, TrackletRecord
from index.json_values import check_json

ID_PATTERN = r"^[A-Za-z0-9_.:-]{1,128}$"
Id = Annotated[str, StringConstraints(pattern=ID_PATTERN)]
CameraId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.:-]{1,64}$")]
RECORD_EXAMPLE: dict[str, Any] = {
    "tracklet_id": "01JDA3Y3GZ5T8W4T0V6M2QH7RN",
    "identity": "p17",
    "camera": "c2",
    "start_time": None,
    "end_time": None,
    "metadata": {},
    "frames": {"received": 73, "used": 15},
    "model": "trsa-9f2c41d07b3e",
    "created_at": "2026-11-22T12:00:00Z",
    "content": "5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef",
}


_DATE_AND_TIME = re.compile(r"\d{4}-\d{2}-\d{2}[Tt ]\d{2}:.*")


def _check_is_text(value: Any) -> Any:
    """Refuse numbers, which pydantic would read as seconds since 1970: ``since=2026`` is not."""
    if not isinstance(value, str) or not _DATE_AND_TIME.fullmatch(value):
        raise ValueError("expected a time with an offset, like 2026-11-22T12:00:00Z")
    return value


def _to_utc(value: datetime) -> datetime:
    try:
        return value.astimezone(UTC)
    except OverflowError as error:
        raise ValueError("expected a time in the years 1 to 9999 UTC, got another") from error


Time = Annotated[AwareDatetime, BeforeValidator(_check_is_text), AfterValidator(_to_utc)]


def now() -> datetime:
    """What the time is, UTC."""
    return datetime.now(UTC)


def _check_to_come(value: datetime) -> datetime:
    """Refuse what would erase a tracklet at once: a wrong zone or year, hardly ever a wish."""
    if value <= (here := now()):
        raise ValueError(
            f"expected a time to come, later than {format_time(here)}, got one that is over"
        )
    return value


Expiry = Annotated[Time, AfterValidator(_check_to_come)]


def _check_metadata(value: dict[str, Any]) -> dict[str, Any]:
    check_json(value)
    return value


Metadata = Annotated[dict[str, Any], AfterValidator(_check_metadata)]


def parse_object(text: str) -> dict[str, Any]:
    """Read a JSON object; NaN and infinity are not JSON.

    Raises:
        ValueError: It is something else.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError("expected a JSON object, got something that is not JSON") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {_json_name(value)}")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _json_name(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def format_time(value: datetime | None) -> str | None:
    """RFC 3339 in UTC, as answers carry times."""
    return None if value is None else value.astimezone(UTC).isoformat().replace("+00:00", "Z")


class Body(BaseModel):
    """Base of all bodies: unknown members are errors."""

    model_config = ConfigDict(extra="forbid")


class FrameCounts(Body):
    """How many frames came, and how many made the embedding."""

    received: int = Field(ge=1)
    used: int = Field(ge=1)


class QualityBody(Body):
    """What helps a person to judge whether an answer can be trusted."""

    frames: int = Field(ge=1, description="Frames that made the embedding.")
    shortest_side: int = Field(ge=1, description="Of the smallest of them as it was sent, pixels.")
    sharpness: float = Field(
        ge=0, description="Variance of the Laplacian at the network's size; small is blurred."
    )
    brightness: float = Field(ge=0, le=1, description="0 is black, 1 is white.")
    frame_distance: float = Field(
        ge=0,
        description="Mean Euclidean distance of the frames' embeddings to the tracklet's: large "
        "where a tracker has changed to another person on the way.",
    )


class RecordBody(Body):
    """A stored tracklet."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [RECORD_EXAMPLE]})

    tracklet_id: Id
    identity: Id | None
    camera: CameraId | None
    start_time: str | None
    end_time: str | None
    metadata: dict[str, Any]
    frames: FrameCounts
    model: str = Field(description="Fingerprint of the checkpoint that embedded it.")
    created_at: str
    content: str = Field(description="SHA-256 of the uploaded frames, hex.")
    expires_at: str | None = Field(None, description="When it is erased.")
    quality: QualityBody | None = Field(
        None, description="Null where it was enrolled before qualities were kept."
    )

    @classmethod
    def of(cls, record: TrackletRecord) -> Self:
        """The body of a record."""
        return cls(
            tracklet_id=record.tracklet_id,
            identity=record.identity,
            camera=record.camera,
            start_time=format_time(record.start_time),
            end_time=format_time(record.end_time),
            metadata=dict(record.metadata),
            frames=FrameCounts(received=record.frames_received, used=record.frames_used),
            model=record.model,
            created_at=format_time(record.created_at) or "",
            content=record.content.partition(":")[0],
            expires_at=format_time(record.expires_at),
            quality=None if record.quality is None else QualityBody(**record.quality),
        )


class PageBody(Body):
    """One page of stored tracklets, in the order of enrolment."""

    items: list[RecordBody]
    next_cursor: str | None = Field(description="Pass it as `cursor`; null on the last page.")


def _check_order(start: datetime | None, end: datetime | None) -> None:
    if start is not None and end is not None and end < start:
        raise ValueError("expected end_time at or after start_time, got an earlier one")


class EnrolFields(Body):
    """Form fields of an enrolment beside its upload."""

    identity: Id | None = None
    camera: CameraId | None = None
    tracklet_id: Id | None = None
    start_time: Time | None = None
    end_time: Time | None = None
    metadata: Metadata = Field(default_factory=dict)
    expires_at: Expiry | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_metadata(cls, values: Any) -> Any:
        # An HTML form sends the fields that were left blank as well.
        filled = {name: value for name, value in values.items() if value != ""}
        if isinstance(filled.get("metadata"), str):
            filled["metadata"] = parse_object(filled["metadata"])
        return filled

    @model_validator(mode="after")
    def _check_times(self) -> Self:
        _check_order(self.start_time, self.end_time)
        return self


class PatchBody(Body):
    """Changes to a record, as a JSON merge patch (RFC 7396): null removes."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"identity": "p17", "metadata": {"coat": "red"}}]},
    )

    identity: Id | None = None
    camera: CameraId | None = None
    start_time: Time | None = None
    end_time: Time | None = None
    metadata: Metadata | None = None
    expires_at: Expiry | None = None

    def changes(self, record: TrackletRecord) -> dict[str, Any]:
        """New values by field name.

        Raises:
            ValueError: They contradict each other or the record.
        """
        changes = {name: getattr(self, name) for name in self.model_fields_set}
        if "metadata" in changes:
            patch = changes["metadata"]
            changes["metadata"] = {} if patch is None else merge(dict(record.metadata), patch)
        _check_order(
            changes.get("start_time", record.start_time), changes.get("end_time", record.end_time)
        )
        return changes


def merge(target: Any, patch: Any) -> Any:
    """Apply a JSON merge patch (RFC 7396); neither argument is changed."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge(merged.get(name), value)
    return merged


class PageParameters(Body):
    """Which page."""

    limit: int = Field(100, ge=1, le=1000, description="Items on a page at most.")
    cursor: str | None = Field(None, max_length=1024, description="From the page before.")


class ListParameters(PageParameters):
    """Which page of which records."""

    identity: Id | None = Field(None, description="Only this identity.")
    camera: CameraId | None = Field(None, description="Only this camera.")
    since: Time | None = Field(None, description="Only what starts at or after this time.")
    until: Time | None = Field(None, description="Only what starts at or before this time.")
    unnamed: bool = Field(False, description="Only tracklets without an identity.")

    def filters(self) -> Filters:
        """As the gallery takes them."""
        return Filters(
            identities=None if self.identity is None else frozenset({self.identity}),
            unnamed=self.unnamed,
            cameras=None if self.camera is None else frozenset({self.camera}),
            since=self.since,
            until=self.until,
        )


class NoParameters(Body):
    """For routes without any: one that would be ignored is a mistake, and refused."""


_NO_FRAMES = (
    "expected no explain of a stored tracklet, got one: what is stored is its embedding, and there "
    "are no frames to look at; POST /query with its frames explains"
)


class SearchParameters(Body):
    """What to search for, and where."""

    top_k: int = Field(10, ge=1, le=500, description="Matches at most.")
    group_by: GroupBy = Field("identity", description="Rank identities, or single tracklets.")
    camera: list[CameraId] = Field([], description="Only these cameras.")
    exclude_camera: list[CameraId] = Field([], description="Not these cameras.")
    since: Time | None = Field(None, description="Only what starts at or after this time.")
    until: Time | None = Field(None, description="Only what starts at or before this time.")
    max_distance: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="Leave out matches farther than this."
    )

    @model_validator(mode="before")
    @classmethod
    def _say_why_not_explain(cls, values: Any) -> Any:
        # Where only frames could explain, and there are none, "not permitted" would not say so.
        if "explain" in values and "explain" not in cls.model_fields:
            reason = PydanticCustomError("no_frames", _NO_FRAMES)
            raise PydanticError.from_exception_data(
                cls.__name__, [{"type": reason, "loc": ("explain",), "input": None}]
            )
        return values

    def filters(self, *, exclude_tracklets: frozenset[str] = frozenset()) -> Filters:
        """As the gallery takes them."""
        return Filters(
            cameras=frozenset(self.camera) or None,
            exclude_cameras=frozenset(self.exclude_camera),
            since=self.since,
            until=self.until,
            exclude_tracklets=exclude_tracklets,
        )


class QueryParameters(SearchParameters):
    """The same, of an upload."""

    explain: bool = Field(False, description="Answer where the network looked in each used frame.")


class MatchBody(Body):
    """One rank of an answer."""

    rank: int = Field(ge=1)
    identity: Id | None
    distance: float = Field(ge=0, description="Euclidean, not squared.")
    tracklet: RecordBody = Field(description="The nearest tracklet of this identity.")


class TimingBody(Body):
    """Where the time went, milliseconds."""

    decode: float
    queue: float
    embed: float
    search: float
    total: float


class AttentionBody(Body):
    """Where the network looked in one used frame."""

    frame: int = Field(ge=0, description="Index of the frame in the upload.")
    map: list[list[float]] = Field(
        description="16 rows of 8 numbers, top to bottom; all sum to 1. Spread by area where the "
        "network has another grid."
    )


class QueryBody(Body):
    """The gallery's answer: who it looks most like."""

    matches: list[MatchBody]
    decision: Literal["match", "no_match"] | None = Field(
        description="The nearest distance against the threshold; null while none is set."
    )
    threshold: float | None
    searched: int = Field(ge=0, description="Tracklets that the filters let through.")
    model: str
    frames: FrameCounts
    quality: QualityBody | None
    timing_ms: TimingBody
    attention: list[AttentionBody] | None = None


class EmbedBody(Body):
    """An embedding, to be used elsewhere."""

    embedding: list[float]
    dim: int
    model: str
    frames: FrameCounts
    quality: QualityBody
    timing_ms: TimingBody


class SideBody(Body):
    """What is known of one of two uploads."""

    frames: FrameCounts
    quality: QualityBody


class VerifyBody(Body):
    """Whether two tracklets show the same person."""

    distance: float = Field(ge=0, description="Euclidean, not squared.")
    same: bool | None = Field(
        description="The distance against the threshold; null while none is set."
    )
    threshold: float | None
    model: str
    a: SideBody
    b: SideBody
    timing_ms: TimingBody


class IdentityBody(Body):
    """What is known of an identity."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"identity": "p17", "tracklets": 4, "cameras": ["c1", "c2"]}]
        },
    )

    identity: Id
    tracklets: int = Field(ge=1, description="How many show it.")
    cameras: list[CameraId] = Field(description="Where it was seen, sorted.")

    @classmethod
    def of(cls, summary: IdentitySummary) -> Self:
        """The body of a summary."""
        return cls(
            identity=summary.identity,
            tracklets=summary.tracklets,
            cameras=list(summary.cameras),
        )


class IdentitiesBody(Body):
    """One page of identities, in the order of their names."""

    items: list[IdentityBody]
    next_cursor: str | None = Field(description="Pass it as `cursor`; null on the last page.")


class RenameBody(Body):
    """Another name for an identity."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"identity": "p18"}]})

    identity: Id


class MergeBody(Body):
    """Into which identity another one goes."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"into": "p17"}]})

    into: Id


class AssignBody(Body):
    """Tracklets that show one identity."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"tracklet_ids": ["01JDA3Y3GZ5T8W4T0V6M2QH7RN"]}]},
    )

    tracklet_ids: list[Id] = Field(min_length=1, max_length=1000)


class AssignedBody(Body):
    """What has become of them."""

    identity: Id
    changed: int = Field(ge=0, description="Of how many something else was said before.")


class ErasedBody(Body):
    """What was erased."""

    identity: Id
    tracklets: list[Id] = Field(description="Their ids, in the order of enrolment.")


class ProblemBody(BaseModel):
    """RFC 9457."""

    type: str = Field(examples=["/problems/validation"])
    title: str
    status: int
    detail: str
    request_id: str | None
    errors: list[dict[str, str]] | None = None


UPLOAD_SCHEMA: dict[str, Any] = {
    "frames": {
        "type": "array",
        "items": {"type": "string", "format": "binary"},
        "description": "Images in temporal order (JPEG, PNG, WebP, BMP), each one person crop.",
    },
    "archive": {
        "type": "string",
        "format": "binary",
        "description": "One zip of such images, in natural order of their names.",
    },
    "video": {
        "type": "string",
        "format": "binary",
        "description": "One video file whose frames are the person crop.",
    },
}
_ENROL_SCHEMA: dict[str, Any] = {
    "identity": {"type": "string", "pattern": ID_PATTERN, "examples": ["p17"]},
    "camera": {"type": "string", "pattern": "^[A-Za-z0-9_.:-]{1,64}$", "examples": ["c2"]},
    "tracklet_id": {"type": "string", "pattern": ID_PATTERN},
    "start_time": {"type": "string", "format": "date-time"},
    "end_time": {"type": "string", "format": "date-time"},
    "metadata": {"type": "string", "description": "A JSON object.", "examples": ['{"gate": 4}']},
    "expires_at": {
        "type": "string",
        "format": "date-time",
        "description": "When it is erased, to the minute; a time to come.",
    },
}


def upload_body(*, with_fields: bool = False, prefixes: Sequence[str] = ("",)) -> dict[str, Any]:
    """The OpenAPI description of a tracklet upload, or of one for each prefix."""
    properties = {p + name: one for p in prefixes for name, one in UPLOAD_SCHEMA.items()}
    if with_fields:
        properties |= _ENROL_SCHEMA
    each = "Exactly one of frames, archive and video"
    return {
        "requestBody": {
            "required": True,
            "description": f"{each}{', for each prefix' if len(prefixes) > 1 else ''}.",
            "content": {
                "multipart/form-data": {
                    "schema": {"type": "object", "properties": properties},
                    "encoding": {
                        f"{prefix}frames": {"contentType": "image/*", "style": "form"}
                        for prefix in prefixes
                    },
                }
            },
        }
    }


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI description of the problems that a route answers."""
    content = {"application/problem+json": {"schema": ProblemBody.model_json_schema()}}
    return {
        status: {"description": "A problem (RFC 9457).", "content": content} for status in statuses
    }
