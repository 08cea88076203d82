"""Ranked film strips and attention, as cards of a report with their pictures."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from model.report_data import Attended, Evaluation, Match, Ranking, Shown, Unit
from model.report_pictures import Pixels, read_cell, spread, write_attention, write_strip

_FAILURES = 8
_SUCCESSES_EACH = 2
_FAILURE_MATCHES, _SUCCESS_MATCHES = 10, 5
_QUERY_FRAMES, _MATCH_FRAMES, _ATTENTION_FRAMES = 8, 4, 8


@dataclass(slots=True)
class Cards:
    """Makes cards and writes their pictures, each tracklet's strip once.

    Args:
        evaluation: What to show.
        folder: Where pictures go.
        written: Pictures, as they are written.
    """

    evaluation: Evaluation
    folder: Path
    written: set[Path] = field(default_factory=set)
    _cells: dict[str, Pixels | None] = field(default_factory=dict)
    _strips: dict[tuple[str, ...], dict[str, Any]] = field(default_factory=dict)
    _known: dict[str, dict[str, Shown]] = field(default_factory=dict)  # by identity, then by key

    def __post_init__(self) -> None:
        for unit in self.evaluation.units:
            for ranking in unit.rankings:
                for match in ranking.top:
                    one = match.tracklet
                    self._known.setdefault(one.identity, {}).setdefault(one.key, one)

    @property
    def frames(self) -> int:
        """How many different frames were asked for so far."""
        return len(self._cells)

    @property
    def missing(self) -> int:
        """How many of them could not be read."""
        return sum(cell is None for cell in self._cells.values())

    def failures(self) -> list[dict[str, Any]]:
        """The queries whose first right match stands last, at most one of each person."""
        failed = [one for one in self._rankings() if one.place > 1]
        failed.sort(key=lambda one: -one.place)  # stable: otherwise in the order of the splits
        worst = _one_each(failed)[:_FAILURES]
        return [self._card(one, _FAILURE_MATCHES) for one in worst]

    def successes(self) -> list[dict[str, Any]]:
        """Queries answered at once: where a wrong match was nearly nearer, and the clearest."""
        found = [one for one in self._rankings() if one.place == 1]
        found.sort(key=lambda one: one.margin)
        ordered = _one_each(found)
        few = ordered[:_SUCCESSES_EACH] + ordered[_SUCCESSES_EACH:][-_SUCCESSES_EACH:]
        return [self._card(one, _SUCCESS_MATCHES) for one in few]

    def _rankings(self) -> Iterator["_Answer"]:
        for unit in self.evaluation.units:
            for ranking in unit.rankings:
                if ranking.rank is not None:
                    yield _Answer(unit, ranking, ranking.rank)

    def attention(self) -> list[dict[str, Any]]:
        """Where the network looked in the frames of stored queries."""
        return [self._attention_card(one) for one in self.evaluation.attention]

    def _card(self, answer: "_Answer", shown: int) -> dict[str, Any]:
        query, matches = answer.ranking.query, answer.ranking.top[:shown]
        return {
            "title": f"{query.identity}, seen by {query.camera}",
            "summary": answer.describe(matches),
            "strips": [self._titled("query", query), *self._sought(answer.ranking, matches)],
            "matches": [self._match(place, match) for place, match in enumerate(matches, start=1)],
        }

    def _titled(self, title: str, tracklet: Shown) -> dict[str, Any]:
        label = f"{title}: {_label(tracklet)}"
        alt = f"Frames of the {label}."
        return {"label": label, "alt": alt, **self._strip(tracklet, _QUERY_FRAMES)}

    def _sought(self, ranking: Ranking, matches: Sequence[Match]) -> list[dict[str, Any]]:
        """Show what should have been found, where no match does and another query has found it."""
        if any(match.correct for match in matches):
            return []
        query = ranking.query
        for one in self._known.get(query.identity, {}).values():
            searched = not ranking.pair or ranking.pair == f"{query.camera}>{one.camera}"
            if searched and one.camera != query.camera:
                return [self._titled("person sought", one)]
        return []

    def _match(self, place: int, match: Match) -> dict[str, Any]:
        verdict = "right" if match.correct else "wrong"
        return {
            "place": place,
            "correct": match.correct,
            "label": _label(match.tracklet),
            "distance": f"{match.distance:.3f}",
            "alt": f"Place {place}, {verdict}: frames of {_label(match.tracklet)}.",
            **self._strip(match.tracklet, _MATCH_FRAMES),
        }

    def _attention_card(self, one: Attended) -> dict[str, Any]:
        places = spread(len(one.maps), _ATTENTION_FRAMES)
        cells = [self._cell(one.query.frames[place]) for place in places]
        total = one.maps.sum(axis=0)  # (H, W): S of Eq. 4
        path = self._next("attention")
        size = write_attention(cells, one.maps[places], total, path)
        return {
            "title": f"{one.query.identity}, seen by {one.query.camera}",
            "summary": _describe_attention(one, len(places)),
            "alt": f"Frames of {_label(one.query)} above, attention laid over them below, and "
            "their sum map.",
            **self._picture(path, size),
        }

    def _strip(self, tracklet: Shown, most: int) -> dict[str, Any]:
        known = tracklet.frames or ("",)  # a frame that is nowhere
        frames = [known[place] for place in spread(len(known), most)]
        key = (tracklet.key, str(most), *frames)
        if key not in self._strips:
            path = self._next("strip")
            size = write_strip([self._cell(frame) for frame in frames], path)
            self._strips[key] = self._picture(path, size)
        return self._strips[key]

    def _cell(self, frame: str) -> Pixels | None:
        if frame not in self._cells:
            self._cells[frame] = read_cell(self.evaluation.frame(frame))
        return self._cells[frame]

    def _next(self, kind: str) -> Path:
        # Numbered, never named after people: names of folders may be no names of files elsewhere.
        number = sum(path.name.startswith(kind) for path in self.written) + 1
        path = self.folder / f"{kind}-{number:03d}.jpg"
        self.written.add(path)
        return path

    def _picture(self, path: Path, size: tuple[int, int]) -> dict[str, Any]:
        return {"picture": path.name, "width": size[0], "height": size[1]}


@dataclass(frozen=True, slots=True)
class _Answer:
    """A ranking with its unit and its place, the rank of the first right match."""

    unit: Unit
    ranking: Ranking
    place: int

    @property
    def margin(self) -> float:
        """How much farther the nearest wrong match is than the nearest right one."""
        right = [match.distance for match in self.ranking.top if match.correct]
        wrong = [match.distance for match in self.ranking.top if not match.correct]
        # No wrong one among the nearest ten: clearer than any other.
        return min(wrong) - min(right) if right and wrong else float("inf")

    def describe(self, shown: Sequence[Match]) -> str:
        """Say in a line how the query fared."""
        told = f"split {self.unit.split}"
        told += "" if self.unit.seed is None else f", seed {self.unit.seed}"
        told += "" if self.unit.frame_seed is None else f", frame seed {self.unit.frame_seed}"
        if self.ranking.pair:
            told += f", {self.ranking.pair.replace('>', ' → ')}"
        if self.place == 1:
            if self.margin == float("inf"):
                return f"{told}: right at once, with no wrong match near"
            return f"{told}: right at once; the nearest wrong match is {self.margin:.3f} farther"
        seen = "" if any(match.correct for match in shown) else ", beyond those shown"
        return f"{told}: the first right match stands in place {self.place}{seen}"


def _one_each(answers: Sequence[_Answer]) -> list[_Answer]:
    """Keep the first answer of each person, so that one hard person does not fill the page."""
    first: dict[str, _Answer] = {}
    for answer in answers:
        first.setdefault(answer.ranking.query.identity, answer)
    return list(first.values())


def _label(tracklet: Shown) -> str:
    return " · ".join(filter(None, (tracklet.identity, tracklet.camera, tracklet.name)))


def _describe_attention(one: Attended, shown: int) -> str:
    frames, height, width = one.maps.shape
    cells = height * width
    # The number of cells that would share a frame's attention evenly, mean over frames.
    effective = float(np.mean(1 / np.square(one.maps, dtype=np.float64).sum(axis=(1, 2))))
    total = one.maps.sum(axis=0, dtype=np.float64)
    spread_of_sum = float((total.std() / total.mean()) ** 2)
    fate = "right at once" if one.rank == 1 else f"right match in place {one.rank}"
    return (
        f"{fate}; {shown} of {frames} frames shown; attention is worth {effective:.1f} of {cells} "
        f"cells per frame, its largest value is {one.maps.max():.3f}; S is uneven by "
        f"CV² = {spread_of_sum:.2f} (0 is even)"
    )
