"""The picture of an answer: the query's film strip above the strips of its best matches."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from model.frames import Preprocessing, choose_frames
from service.client import ClientError, LocalTracklet
from service.settings import LimitSettings
from service.strips import FRAMES, HEIGHT
from service.uploads import FrameChoice, decode, unpack

INK, PALE, PAPER, RULE = (24, 28, 36), (110, 118, 130), (255, 255, 255), (222, 226, 232)
MARGIN, GAP, LABEL_WIDTH = 28, 14, 240
STRIP_WIDTH = FRAMES * HEIGHT // 2
# Where the network does not look stays as it is; where it looks goes over yellow to red.
_HEAT = np.array([[255, 236, 130], [250, 160, 40], [214, 30, 30]], dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Row:
    """One strip with what is said about it.

    Args:
        title: In large letters.
        lines: Below it.
        strip: The film strip, or None where none is kept.
    """

    title: str
    lines: tuple[str, ...]
    strip: Image.Image | None


def draw_answer(
    query: LocalTracklet,
    name: str,
    answer: dict[str, Any],
    strips: Sequence[bytes | None],
    path: Path,
) -> None:
    """Write the picture of an answer.

    Args:
        query: What was asked.
        name: What to call it.
        answer: Body of ``POST /query``.
        strips: Film strip of each match, JPEG bytes, or None.
        path: The picture; the suffix decides its format.

    Raises:
        ClientError: The picture cannot be written.
    """
    rows = _query_rows(query, name, answer)
    if not answer["matches"]:
        rows.append(Row("nobody", ("the gallery has no match",), None))
    for match, strip in zip(answer["matches"], strips, strict=True):
        record = match["tracklet"]
        received = record["frames"]["received"]
        rows.append(
            Row(
                f"{match['rank']}   {match['identity'] or 'unnamed'}",
                (
                    f"distance {match['distance']:.3f}",
                    f"camera {record['camera'] or 'unknown'}, {received} frames",
                ),
                None if strip is None else Image.open(io.BytesIO(strip)),
            )
        )
    picture = _draw(rows, heading_rows=2 if answer.get("attention") else 1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    except (OSError, ValueError) as error:  # the latter where the suffix names no format
        raise ClientError(f"could not write the picture {path}: {error}") from error


def _query_rows(query: LocalTracklet, name: str, answer: dict[str, Any]) -> list[Row]:
    frames = _decode_all(query)
    attention = answer.get("attention")
    if attention:
        shown = [attention[i] for i in choose_frames(len(attention), FRAMES)]
        plain = [frames[one["frame"]] for one in shown]
    else:
        plain = [frames[i] for i in choose_frames(len(frames), FRAMES)]
    counts = answer["frames"]
    rows = [
        Row(
            "query",
            (name, f"{counts['used']} of {counts['received']} frames used"),
            _join(plain),
        )
    ]
    if attention:
        heated = [lay_over(f, np.array(one["map"])) for f, one in zip(plain, shown, strict=True)]
        rows.append(Row("attention", ("where the network looked",), _join(heated)))
    return rows


def _decode_all(query: LocalTracklet) -> NDArray[np.uint8]:
    limits = LimitSettings()
    kind, files = unpack({query.kind: [content for _, content in query.files]}, limits)
    small = Preprocessing(height=2 * HEIGHT, width=HEIGHT)
    return decode(kind, files, FrameChoice(len(files), "all", small), limits).clip


def lay_over(frame: NDArray[np.uint8], attention: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Lay one attention map over its frame.

    Args:
        frame: (H, W, 3) uint8 RGB.
        attention: (h, w), sums to 1.

    Returns:
        (H, W, 3) uint8 RGB. The strongest cell is fully coloured, whatever its value.
    """
    height, width = frame.shape[:2]
    strength = Image.fromarray((attention / attention.max()).astype(np.float32))
    weight = np.asarray(strength.resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)
    steps = np.linspace(0, 1, len(_HEAT))
    colour = np.stack([np.interp(weight, steps, _HEAT[:, channel]) for channel in range(3)], axis=2)
    opacity = 0.75 * weight[..., None]
    mixed: NDArray[np.float64] = (1 - opacity) * frame + opacity * colour
    return mixed.round().astype(np.uint8)


def _join(frames: Sequence[NDArray[np.uint8]]) -> Image.Image:
    size = (HEIGHT // 2, HEIGHT)
    small = [
        np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))
        for frame in frames
    ]
    return Image.fromarray(np.concatenate(small, axis=1))


def _draw(rows: Sequence[Row], heading_rows: int) -> Image.Image:
    width = 2 * MARGIN + LABEL_WIDTH + STRIP_WIDTH
    height = 2 * MARGIN + len(rows) * (HEIGHT + GAP) + GAP
    picture = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(picture)
    large, small = ImageFont.load_default(24), ImageFont.load_default(15)
    top = MARGIN
    for number, row in enumerate(rows):
        if number == heading_rows:
            draw.line((MARGIN, top, width - MARGIN, top), fill=RULE, width=2)
            top += GAP
        draw.text((MARGIN, top + 18), _fit(row.title, large), fill=INK, font=large)
        for line, text in enumerate(row.lines):
            draw.text((MARGIN, top + 56 + 22 * line), _fit(text, small), fill=PALE, font=small)
        left = MARGIN + LABEL_WIDTH
        if row.strip is not None:
            picture.paste(row.strip, (left, top))
        else:
            draw.rectangle((left, top, left + STRIP_WIDTH, top + HEIGHT), outline=RULE)
            draw.text(
                (left + 16, top + HEIGHT // 2 - 8), "no film strip kept", fill=PALE, font=small
            )
        top += HEIGHT + GAP
    return picture


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Shorten a text that would run into the strip."""
    limit = LABEL_WIDTH - GAP
    if font.getlength(text) <= limit:
        return text
    while text and font.getlength(text + "…") > limit:
        text = text[:-1]
    return text + "…"
