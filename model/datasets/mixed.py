"""Several data sets as one: folders, or links to folders, of any other layouts side by side.

Each part keeps its own cameras and people: both get the part's name in front, ``ward/person_0001``
seen by ``ward/cam_1``, so that nobody is taken for a namesake of another part.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from model.datasets.findings import Finding, Survey
from model.datasets.splits import sort_tracklets
from model.datasets.tracklets import Dataset, Split, Tracklet, natural_key
from model.errors import DatasetError


@dataclass(frozen=True, slots=True)
class Part:
    """One data set of a mix before it is divided, as it would be read alone.

    Args:
        layout: Its own.
        survey: Of its folder; where that is a link, of the folder that it leads to.
    """

    layout: str
    survey: Survey


@dataclass(frozen=True, slots=True)
class MixedSurvey(Survey):
    """What a mix holds: all parts together, and each alone.

    Args:
        parts: By name, in natural order.
    """

    parts: Mapping[str, Part] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MixedDataset(Dataset):
    """A mix with its splits.

    Args:
        parts: Each part as it is alone, by name; people and cameras without its name in front. Its
            splits are those that the splits of the mix, of the same names, are made of.
    """

    parts: Mapping[str, Dataset]

    def part_splits(self, split: Split) -> dict[str, Split]:
        """Return what a split of the mix is made of, by the name of the part."""
        return {
            name: next(one for one in part.splits if one.name == split.name)
            for name, part in self.parts.items()
        }


def part_of(identity: str) -> str:
    """The part of a mix that an identity belongs to; "" outside of a mix."""
    part, slash, _ = identity.partition("/")
    return part if slash else ""


def join_surveys(root: Path, parts: Mapping[str, Part], findings: Sequence[Finding]) -> MixedSurvey:
    """Put the parts of a mix together.

    Args:
        root: The folder of the mix.
        parts: By name.
        findings: About the mix itself; those about parts come from their surveys.
    """
    every = list(findings)
    distractors: set[str] = set()
    tracklets: list[Tracklet] = []
    for name, part in parts.items():
        every += prefix_findings(name, part.survey.findings)
        distractors |= {f"{name}/{one}" for one in part.survey.distractors}
        tracklets += _prefix_tracklets(name, part.survey.tracklets)
    return MixedSurvey(
        root=root,
        tracklets=sort_tracklets(tracklets),
        findings=tuple(every),
        distractors=frozenset(distractors),
        parts=dict(sorted(parts.items(), key=lambda item: natural_key(item[0]))),
    )


def prefix_findings(name: str, findings: Iterable[Finding]) -> Iterator[Finding]:
    """Put the name of a part in front of what its findings are about."""
    for one in findings:
        yield replace(one, where=name if one.where == "." else f"{name}/{one.where}")


def check_shares(shares: Mapping[str, float], parts: Mapping[str, object]) -> None:
    """Refuse test shares of parts that are not there.

    Raises:
        DatasetError: A part is unknown; those that exist are listed.
    """
    if unknown := sorted(set(shares) - set(parts), key=natural_key):
        raise DatasetError(
            f"test_share: expected parts among {', '.join(parts)}, got {', '.join(unknown)}"
        )


@contextmanager
def naming(part: str) -> Iterator[None]:
    """Let an error of the block say which part it is about."""
    try:
        yield
    except DatasetError as error:
        raise DatasetError(f"{part}: {error}") from error


def join_splits(
    survey: MixedSurvey, divisions: Mapping[str, Sequence[Split]], *, most: int
) -> MixedDataset:
    """Join split number n of every part to split number n of the mix.

    A part with a single, published split brings it to every one. Of parts with several, those with
    the fewest decide how many there are.

    Args:
        survey: Of the mix.
        divisions: The splits of each part, at least one, by name.
        most: How many splits there are at most.
    """
    count = min((len(splits) for splits in divisions.values() if len(splits) > 1), default=1)
    parts: dict[str, Dataset] = {}
    for name, splits in divisions.items():
        part = survey.parts[name]
        chosen = tuple(
            replace(splits[number if len(splits) > 1 else 0], name=str(number))
            for number in range(min(count, most))
        )
        parts[name] = Dataset(part.layout, part.survey.root, part.survey.tracklets, chosen)
    joined = tuple(
        _join({name: part.splits[number] for name, part in parts.items()})
        for number in range(min(count, most))
    )
    return MixedDataset("mixed", survey.root, survey.tracklets, joined, parts)


def _join(splits: Mapping[str, Split]) -> Split:
    train: list[Tracklet] = []
    query: list[Tracklet] = []
    gallery: list[Tracklet] = []
    for name, split in splits.items():
        train += _prefix_tracklets(name, split.train)
        query += _prefix_tracklets(name, split.query)
        gallery += _prefix_tracklets(name, split.gallery)
    return Split(
        name=next(iter(splits.values())).name,
        train=sort_tracklets(train),
        query=sort_tracklets(query),
        gallery=sort_tracklets(gallery),
        source="; ".join(f"{name}: {split.source}" for name, split in splits.items()),
    )


def _prefix_tracklets(part: str, tracklets: Sequence[Tracklet]) -> Iterator[Tracklet]:
    for one in tracklets:
        identity, camera = f"{part}/{one.identity}", f"{part}/{one.camera}"
        yield Tracklet(identity, camera, one.name, one.frames)
