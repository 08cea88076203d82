"""Every setting: an environment variable and a flag of `passerby serve`, typed and checked."""

import ipaddress
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError

from model.checkpoint import BUNDLED

PREFIX = "PASSERBY_"
MIB = 1024 * 1024
UNTRAINED = "untrained"
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?")


class InvalidSettingsError(Exception):
    """Raised when a setting is unknown or has a value that is not allowed; the message names it."""


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BatchSettings(_Group):
    """How the worker makes batches."""

    max_frames: int | None = Field(
        None,
        ge=1,
        description="Frames in one batch at most; without a number as many as the device takes at "
        "once: 32 or 16 on a CPU, 512 on a GPU.",
    )
    max_delay_ms: float = Field(
        2.0, ge=0, le=1000, description="How long a batch waits for company, milliseconds."
    )


class QueueSettings(_Group):
    """How much work may wait."""

    max_tracklets: int = Field(
        32, ge=1, description="Tracklets that may wait for the worker; one more gets 429."
    )
    deadline_s: float = Field(
        60.0, gt=0, description="Seconds from an upload's last byte to its embedding; then 504."
    )


class LimitSettings(_Group):
    """What a client may send."""

    frames: int = Field(512, ge=1, description="Frames of one tracklet.")
    file_bytes: int = Field(16 * MIB, ge=1, description="Bytes of one file.")
    request_bytes: int = Field(
        64 * MIB, ge=1, description="Bytes of one request, and of a zip unpacked."
    )
    frame_pixels: int = Field(40_000_000, ge=1, description="Pixels of one frame.")
    side_pixels: int = Field(8, ge=1, description="Shortest side of a frame, pixels, at least.")
    metadata_bytes: int = Field(16 * 1024, ge=2, description="Bytes of a metadata object.")
    upload_s: float = Field(60.0, gt=0, description="Seconds that one upload may take to arrive.")
    uploads: int = Field(
        32, ge=1, description="Uploads held in memory at a time; one more gets 429."
    )
    searches: int = Field(
        64, ge=1, description="Searches that may run or wait at a time; one more gets 429."
    )
    writes: int = Field(
        64, ge=1, description="Changes of the gallery that may run or wait; one more gets 429."
    )
    connections: int = Field(
        1000, ge=1, description="Connections at a time; one more gets 429 and is closed."
    )


class AuditSettings(_Group):
    """The audit trail in the data directory: who did what, to whom and when."""

    enabled: bool = Field(True, description="Keep it.")
    file_bytes: int = Field(
        64 * MIB, ge=64 * 1024, description="From how many bytes on another file is begun."
    )
    files: int = Field(
        16, ge=1, le=100_000, description="How many files are kept, the newest included."
    )


class QualitySettings(_Group):
    """What a tracklet must be like to be enrolled or searched for; nothing is asked by default."""

    min_frames: int | None = Field(None, ge=1, description="Used frames at least.")
    min_side_pixels: int | None = Field(
        None, ge=1, description="Shortest side of the smallest used frame, pixels, at least."
    )
    min_sharpness: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="Variance of the Laplacian at least."
    )
    min_brightness: float | None = Field(
        None, ge=0, le=1, description="Mean brightness at least, 0 to 1."
    )
    max_brightness: float | None = Field(
        None, ge=0, le=1, description="Mean brightness at most, 0 to 1."
    )
    max_frame_distance: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="Mean distance of the frames to their tracklet at most.",
    )


class Settings(BaseSettings):
    """All settings. Flags come before environment variables, those before the defaults."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
    )

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    data_dir: Path = Field(Path("data"), description="Where the gallery lives; made if missing.")
    weights: str = Field(
        BUNDLED,
        min_length=1,
        description=f"Checkpoint to serve: a file; {BUNDLED} for the one that comes with Passerby; "
        f"{UNTRAINED} for seeded weights that find nobody.",
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="Of the network; auto takes bf16 where the hardware multiplies it."
    )
    runtime: Literal["auto", "torch", "openvino"] = Field(
        "auto",
        description="What runs the network; auto takes OpenVINO on a CPU where it is installed.",
    )
    decoders: int | None = Field(
        None,
        ge=0,
        le=256,
        description="Processes that decode uploads; without a number one more than there are "
        "cores, 0 for threads of the service's own process.",
    )
    frames_per_tracklet: int = Field(15, ge=1, description="Frames that make an embedding.")
    sampling: Literal["even", "all"] = Field("even", description="How frames are chosen.")
    index: str = Field(
        "Flat",
        description="FAISS factory string of the search index; ;nprobe=, efSearch= and candidates= "
        "behind it say how much it looks at.",
    )
    storage: Literal["float32", "float16"] | None = Field(
        None,
        description="How embeddings are kept, fixed by the first one; without it as they are kept "
        "already, float32 in a new gallery.",
    )
    batch: BatchSettings = BatchSettings()
    queue: QueueSettings = QueueSettings()
    limits: LimitSettings = LimitSettings()
    quality: QualitySettings = QualitySettings()
    audit: AuditSettings = AuditSettings()
    threshold: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="Distance up to which a query is a match."
    )
    retention_days: float | None = Field(
        None,
        gt=0,
        le=36500,
        description="Days after which a tracklet is erased, to the minute; kept where none.",
    )
    thumbnails: bool = Field(True, description="Keep a small film strip of each tracklet.")
    keep_frames: bool = Field(
        False, description="Keep the used frames, so that another model can embed them later."
    )
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (),
        description="Keys beside those of `passerby keys`, separated by commas: an admin's, or "
        "read:KEY and write:KEY.",
    )
    first_key: bool = Field(
        False, description="Make a first key with role admin where there is none, and print it."
    )
    insecure: bool = Field(
        False, description="Listen to other machines without any key: open to whoever comes."
    )
    rate_limit: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="Requests a minute with one key; one more gets 429. Any number where none.",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Origins whose pages may ask from a browser, like https://desk.example, "
        "separated by commas; none where none.",
    )
    trusted_proxies: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Addresses or networks of the proxies that are believed who a client is "
        "(X-Forwarded-For, X-Forwarded-Proto), separated by commas.",
    )
    otlp_endpoint: str | None = Field(
        None,
        pattern="^https?://[^/]+",
        description="Where traces go, an OTLP collector's address like http://collector:4318; the "
        "variable OTEL_EXPORTER_OTLP_ENDPOINT does the same. None are made where none.",
    )
    log_format: Literal["json", "text"] = Field("text", description="How log lines are written.")
    shutdown_grace_s: float = Field(
        30.0, ge=0, description="Seconds that accepted requests get to finish at SIGTERM."
    )

    @field_validator("api_keys", "cors_origins", "trusted_proxies", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(value.replace(",", " ").split())
        return value

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        # Not "*": whoever has a key in a page of his own would hand it to any other page.
        if not all(_ORIGIN.fullmatch(origin) for origin in origins):
            raise ValueError("expected origins like https://desk.example:8443, without a path")
        return origins

    @field_validator("trusted_proxies")
    @classmethod
    def _check_proxies(cls, proxies: tuple[str, ...]) -> tuple[str, ...]:
        for proxy in proxies:
            ipaddress.ip_network(proxy)
        return proxies

    @classmethod
    def load(cls, flags: Sequence[str] = (), program: str = "passerby serve") -> Self:
        """Read flags and environment.

        Args:
            flags: Command line arguments, like ``["--port", "8001"]``.
            program: What usage messages call the command.

        Raises:
            InvalidSettingsError: A ``PASSERBY_`` variable is unknown, or a value is not allowed.
            SystemExit: A flag is unknown, or help was asked for; argparse has answered.
        """
        check_names(os.environ)
        secrets: dict[str, Any] = _read_secret_files(os.environ)
        try:
            # An empty list, not None: no flags must not mean "read sys.argv".
            return cls(_cli_parse_args=list(flags), _cli_prog_name=program, **secrets)
        except ValidationError as error:
            raise InvalidSettingsError(_describe(error)) from error
        except SettingsError as error:
            raise InvalidSettingsError(str(error)) from error


SECRETS = ("api_keys",)


def known_names() -> set[str]:
    """The names of all environment variables that mean something."""
    names = set()
    for name, field in Settings.model_fields.items():
        group = field.annotation
        if isinstance(group, type) and issubclass(group, _Group):
            names |= {f"{name}__{child}" for child in group.model_fields}
        else:
            names.add(name)
    names |= {f"{secret}_file" for secret in SECRETS}
    return {PREFIX + name.upper() for name in names}


def check_names(environment: os._Environ[str] | dict[str, str]) -> None:
    """Refuse a ``PASSERBY_`` variable that nobody reads: a typo must not pass for a setting.

    Raises:
        InvalidSettingsError: There is one; the message lists what exists.
    """
    known = known_names()
    unknown = sorted(
        n for n in environment if n.upper().startswith(PREFIX) and n.upper() not in known
    )
    if unknown:
        raise InvalidSettingsError(
            f"unknown setting {', '.join(unknown)}; expected one of {', '.join(sorted(known))}"
        )


def _read_secret_files(environment: os._Environ[str] | dict[str, str]) -> dict[str, str]:
    given = {name.upper(): value for name, value in environment.items()}  # as pydantic reads it
    values = {}
    for secret in SECRETS:
        name = f"{PREFIX}{secret.upper()}"
        path = given.get(f"{name}_FILE")
        if path is None:
            continue
        if name in given:
            raise InvalidSettingsError(f"expected {name} or {name}_FILE, got both")
        try:
            values[secret] = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidSettingsError(f"{name}_FILE: could not read the file it names") from error
        if not values[secret].strip(", \t\r\n"):
            # Who mounts a secret means to lock the door.
            raise InvalidSettingsError(f"{name}_FILE: expected a secret in the file, got none")
    return values


def _describe(error: ValidationError) -> str:
    lines = []
    for problem in error.errors(include_input=False, include_url=False):
        name = PREFIX + "__".join(str(part) for part in problem["loc"]).upper()
        lines.append(f"{name}: {problem['msg']}")
    return "; ".join(lines)
