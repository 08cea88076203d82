"""The page of an evaluation: what it says, what it shows, and what it must not claim."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from model.anchors import COMPARISONS, TABLE_1
from model.checkpoint import make_checkpoint, save_checkpoint
from model.cli import app
from model.datasets.layouts import fingerprint_dataset, read_dataset
from model.datasets.presets import preset_set
from model.datasets.synthetic import write_set
from model.errors import EvaluationError
from model.evaluation_files import EmbeddingCache
from model.evaluation_plan import EvaluationTask
from model.evaluation_runner import evaluate
from model.frames import Preprocessing
from model.network import NetworkConfig, TrackletNet
from model.report import write_report
from model.report_data import read_evaluation
from model.report_distances import distance_histogram
from model.report_pictures import CELL_HEIGHT, CELL_WIDTH, draw_cmc, placeholder, write_attention

ODD = '<script>alert("1")</script>&\'"'
RATES = ("rank_1", "rank_5", "rank_10", "rank_20", "mAP", "mINP")
UNKNOWN = "\N{EN DASH}"
VOID = {"meta", "img", "source", "br", "link", "input", "hr"}

Json = dict[str, Any]


class Page(HTMLParser):
    """Reads a page and notes what the tests ask for; unbalanced tags are a failure."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if self.open[-1:] and {"th", "td"} & set(self.open):
            self.rows[-1][-1] += data.strip()

    def all(self, tag: str, attribute: str) -> list[str]:
        return [found[attribute] for name, found in self.tags if name == tag and attribute in found]

    def row(self, first: str) -> list[str]:
        [found] = [row for row in self.rows if row and row[0] == first]
        return found

    def has_row(self, first: str) -> bool:
        return any(row and row[0] == first for row in self.rows)


class Fabricated:
    """An evaluation folder as `model.evaluation_runner` writes one, without any evaluating.

    Four people in two cameras; every query finds them in the order of their distance in number.
    """

    people = ("1", "2", "3", ODD)

    def __init__(self, folder: Path, layout: str = "ilids-vid") -> None:
        self.root, self.output, self.layout = folder / "data", folder / "out", layout
        self.data: Json = {"fingerprint": "data-0123456789ab", "layout": layout}
        self.data |= {
            "root": str(self.root),
            "tracklets": 8,
            "identities": 4,
            "cameras": ["a", "b"],
        }
        self.units: list[Json] = []
        self.source = "published: splits.json"
        self.seen = 0
        self.more: Json = {}
        rng = np.random.default_rng(7)
        for number in range(len(self.people)):
            for camera in "ab":
                self._draw(self._frames(number, camera), rng)

    def _frames(self, number: int, camera: str) -> list[str]:
        # Folders without the odd letters: not every file system would take them.
        return [f"{number}/{camera}/{frame}.png" for frame in range(3)]

    def _draw(self, frames: list[str], rng: np.random.Generator) -> None:
        for frame in frames:
            path = self.root / frame
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (12, 6, 3), np.uint8)).save(path)

    def tracklet(self, number: int, camera: str) -> Json:
        frames = self._frames(number, camera)
        return {"identity": self.people[number], "camera": camera, "name": "", "frames": frames}

    def ranking(self, number: int, rank: int) -> Json:
        """A query whose right match stands at a rank."""
        order = [other for other in range(len(self.people)) if other != number]
        order.insert(rank - 1, number)
        top = [
            self.tracklet(other, "b") | {"distance": 0.5 + place / 8, "correct": other == number}
            for place, other in enumerate(order)
        ]
        return {"query": self.tracklet(number, "a"), "rank": rank, "top": top}

    def add(self, split: str, ranks: tuple[int, ...], **more: Any) -> "Fabricated":
        """Add a unit whose queries have these ranks."""
        found = np.array(ranks)
        cmc = [float((found <= k).mean()) for k in range(1, 5)]
        rates = dict(
            zip(RATES, [cmc[0], 1.0, 1.0, 1.0, float((1 / found).mean()), 0.5], strict=True)
        )
        unit = {
            "name": "net",
            "checkpoint": "trsa-0123456789ab",
            "data": self.data,
            "split": split,
            "source": self.source,
            "seed": 0,
            "frame_seed": 0,
            "frames": "even",
            "clip_frames": 15,
            "protocol": "published",
            "reranked": False,
            "unit": False,
            "seen_identities": self.seen,
            "embeddings": "embeddings/kept.npz",
            **rates,
            "cmc": cmc,
            "queries": len(ranks),
            "skipped": 0,
            "gallery": 4,
            "rankings": [self.ranking(number, rank) for number, rank in enumerate(ranks)],
        }
        self.units.append(unit | more)
        return self

    def write(self) -> Path:
        """Write the folder and return it."""
        (self.output / "units").mkdir(parents=True)
        (self.output / "attention").mkdir()
        for number, unit in enumerate(self.units):
            self._dump(f"units/{number}.json", unit)
        rows = np.array([[unit[name] for name in RATES] for unit in self.units])
        mean = dict(zip(RATES, rows.mean(axis=0).tolist(), strict=True))
        std: Json = dict.fromkeys(RATES)
        if len(rows) > 1:
            std = dict(zip(RATES, rows.std(axis=0, ddof=1).tolist(), strict=True))
        maps = np.full((3, 4, 2), 1 / 8, np.float32)
        np.savez(self.output / "attention" / "0.npz", attention=maps)
        kept = {
            "file": "attention/0.npz",
            "kind": "worst",
            "rank": 2,
            "query": self.tracklet(0, "a"),
        }
        results = {
            "data": self.data,
            "options": {"precision": "fp32", "device": "cpu"},
            "network": {"attention": "softmax", "neck": False},
            "checkpoints": [{"name": "net", "provenance": {}}],
            "units": [{"file": f"units/{number}.json"} for number in range(len(self.units))],
            "mean": mean,
            "std": std,
            "seen_identities": self.seen,
            **self.more,
            "attention": [kept],
            "versions": {"passerby": "0"},
            "duration_s": 1.5,
        }
        self._dump("results.json", results)
        return self.output

    def _dump(self, name: str, content: Json) -> None:
        (self.output / name).write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Fabricated:
    """Three published splits of real iLIDS-VID, as far as the files say, with their page."""
    made = Fabricated(tmp_path_factory.mktemp("published"))
    made.add("0", (1, 1, 2, 1)).add("1", (1, 4, 1, 1)).add("2", (1, 1, 3, 2))
    write_report(made.write())
    return made


@pytest.fixture(scope="module")
def page(published: Fabricated) -> Page:
    return Page(published.output / "index.html")


def test_everything_the_page_shows_lies_beside_it(published: Fabricated, page: Page) -> None:
    shown = page.all("img", "src") + page.all("source", "srcset")
    shown += [link for link in page.all("a", "href") if not link.startswith("#")]

    assert len(shown) > 10
    for name in shown:
        assert (published.output / name).is_file(), name
    anchors = {link[1:] for link in page.all("a", "href") if link.startswith("#")}
    assert anchors <= {found["id"] for _, found in page.tags if "id" in found}


def test_the_page_needs_no_network_and_no_script(published: Fabricated, page: Page) -> None:
    source = (published.output / "index.html").read_text(encoding="utf-8")

    assert not {"script", "link", "iframe", "object"} & {name for name, _ in page.tags}
    assert not re.search(r"https?:|url\(|@import", source)
    assert not any(name.startswith("on") for _, found in page.tags for name in found)


def test_names_are_text_wherever_they_stand(published: Fabricated, page: Page) -> None:
    source = (published.output / "index.html").read_text(encoding="utf-8")

    assert ODD in page.text
    assert "<script" not in source
    assert any(ODD in alt for alt in page.all("img", "alt"))


def test_every_picture_has_words_for_who_cannot_see_it(page: Page) -> None:
    pictures = [found for name, found in page.tags if name == "img"]

    assert all(len(found["alt"]) > 10 for found in pictures)
    assert ("html", {"lang": "en"}) in page.tags


def test_mean_and_deviation_are_those_of_the_results(page: Page) -> None:
    """Rank-1 of the three splits is 75, 75 and 50 %."""
    assert page.row("Mean")[2:4] == ["66.7", "100.0"]
    assert page.row("Deviation")[2] == "14.4"
    assert "4 queries put a binomial standard error of 23.6 points" in page.text  # sqrt(2/9 / 4)


def test_right_and_wrong_differ_by_more_than_colour(page: Page) -> None:
    marked = [
        found["class"] for name, found in page.tags if found.get("class") in ("right", "wrong")
    ]

    assert page.text.count("✓ right") == marked.count("right") > 1
    assert page.text.count("✗ wrong") == marked.count("wrong") > 1
    assert "Place 2, right" in " ".join(page.all("img", "alt"))


def test_the_worst_failures_come_first_and_each_person_once(page: Page) -> None:
    """Ranks 4 (person 2), 3 and 2 (person 3) and 2 (the odd one)."""
    places = [int(place) for place in re.findall(r"right match stands in place (\d+)", page.text)]

    assert places == [4, 3, 2]


def test_the_own_row_stands_beside_the_paper_for_published_splits_of_real_data(page: Page) -> None:
    own = [row for row in page.rows if row and row[0] == "This evaluation"]

    assert [row[1:6] for row in own] == [
        # Table 1, the columns of iLIDS-VID
        ["66.7± 14.4", "100.0± 0.0", "100.0± 0.0", "100.0± 0.0", "79.9± 8.4"],
        ["", "66.7", "100.0", "100.0", "100.0"],  # Table 2
    ]
    assert own[0][6:] == [UNKNOWN] * 5
    assert "3 of 10 published splits" in own[1][6]
    assert "nothing here can check pictures or the split file's content" in page.text


def test_the_own_row_says_what_makes_it_another_measurement(tmp_path: Path) -> None:
    made = Fabricated(tmp_path).add("0", (1, 2), clip_frames=8, unit=True, reranked=True)

    page = Page(write_report(made.write()))

    own = [row for row in page.rows if row and row[0] == "This evaluation"]
    for words in ("1 of 10", "clips of 8 frames", "scaled to length 1", "re-ranked"):
        assert words in own[1][6]
    assert page.text.count("This evaluation: 1 of 10 published splits") == 1


def test_the_own_row_of_prid_stands_in_its_columns(tmp_path: Path) -> None:
    page = Page(write_report(Fabricated(tmp_path, "prid-2011").add("0", (1, 2)).write()))
    own = [row for row in page.rows if row and row[0] == "This evaluation"]

    assert own[0][1:7] == [*[UNKNOWN] * 5, "50.0"]
    assert len(own) == 2
    assert "1 of 10 published splits" in own[1][6]


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("drawn", "the data are synthetic"),
        ("half", "the splits are not the published ones, but: random half, seed 0"),
        ("moved", "the data are no longer where they were"),
        ("folder", "the paper measured on iLIDS-VID and PRID-2011"),
        ("seen", "trained on people who are tested"),
        ("pooled", "the protocol is not the published one"),
    ],
)
def test_the_own_row_is_absent_where_it_could_mislead(
    tmp_path: Path, case: str, reason: str
) -> None:
    made = Fabricated(tmp_path, "folder" if case == "folder" else "prid-2011")
    if case == "drawn":
        (made.root / ".truth").mkdir()
        (made.root / ".truth" / "tracklets.jsonl").touch()
    made.source = "random half, seed 0" if case == "half" else made.source
    made.seen = 3 if case == "seen" else 0
    made.add("0", (1, 2), protocol="pooled" if case == "pooled" else "published")
    if case == "moved":
        made.root.rename(tmp_path / "elsewhere")

    page = Page(write_report(made.write()))

    assert not page.has_row("This evaluation")
    assert "Not comparable." in page.text
    assert reason in page.text
    assert page.row("Baseline") == ["Baseline", *_written(0)]


def test_table_1_is_printed_whole(page: Page) -> None:
    names = ["Baseline", "Baseline + Lv", "Baseline +Lv+ SAM", "Baseline +Lv+ SAM + Reg"]
    rows = [row for row in page.rows if row and row[0].startswith("Baseline")]

    assert [row[1:] for row in rows] == [_written(number) for number in range(5)]
    assert [row[0].replace(" ", "") for row in rows[:4]] == [one.replace(" ", "") for one in names]


def _written(number: int) -> list[str]:
    row = TABLE_1[number]
    both = (row.ilids_vid, row.prid_2011)
    return [
        f"{value:.1f}"
        for one in both
        for value in (one.rank_1, one.rank_5, one.rank_10, one.rank_20, one.mean_ap)
    ]


def test_table_1_agrees_with_the_sentences_of_the_paper() -> None:
    """Section 3.3: SAM +4.9, +3; Reg +7.8 / 5.0 and +0.3 / 0.9; focal +1.4 / 1.7, +0.8 / 0.9."""
    rank_1 = np.array([[row.ilids_vid.rank_1, row.prid_2011.rank_1] for row in TABLE_1], float)
    mean_ap = np.array([[row.ilids_vid.mean_ap, row.prid_2011.mean_ap] for row in TABLE_1], float)

    steps = np.diff(rank_1, axis=0)[1:].round(1).tolist()
    assert steps == [[4.9, 3.0], [7.8, 0.3], [1.4, 0.8]]
    assert np.diff(mean_ap, axis=0)[2:].round(1).tolist() == [[5.0, 0.9], [1.7, 0.9]]


def test_the_papers_contradictions_are_marked(page: Page) -> None:
    assert "95.5 in Table 1 and 95.3 in Table 2" in page.text
    assert "Table 3 is an empty box" in page.text
    assert "82.7 - 80.2 = 2.5" in page.text
    [paper] = [row for row in COMPARISONS["ilids-vid"] if row.is_paper]
    assert (paper.figures.rank_5, TABLE_1[-1].ilids_vid.rank_5) == (95.3, 95.5)


def test_frames_that_are_gone_leave_a_box_and_a_note(tmp_path: Path) -> None:
    made = Fabricated(tmp_path).add("0", (2, 1))
    (made.root / "0/a/1.png").unlink()
    (made.root / "1/b/0.png").write_bytes(b"no image")

    page = Page(write_report(made.write()))

    assert "2 of the" in page.text
    assert "grey boxes with a cross" in page.text


def test_frames_are_found_where_the_data_lie_now(tmp_path: Path) -> None:
    made = Fabricated(tmp_path).add("0", (2, 1))
    made.root.rename(tmp_path / "elsewhere")

    page = Page(write_report(made.write(), tmp_path / "elsewhere"))

    assert "grey boxes" not in page.text
    assert page.has_row("This evaluation")


@pytest.mark.parametrize("path", ["../secret.png", "/secret.png", "0/../../secret.png"])
def test_a_frame_outside_the_data_is_never_opened(published: Fabricated, path: str) -> None:
    assert read_evaluation(published.output).frame(path) is None


def test_one_split_has_no_deviation(tmp_path: Path) -> None:
    page = Page(write_report(Fabricated(tmp_path).add("0", (1, 2)).write()))

    assert "one measurement" in page.text
    assert page.row("Deviation")[2:7] == [UNKNOWN] * 5
    assert "This is one measurement" in page.text


def test_camera_pairs_and_occlusion_have_their_tables(tmp_path: Path) -> None:
    """Pairs are averaged over units; queries of a level of occlusion are counted together."""
    made = Fabricated(tmp_path, "folder")
    for split, pair, level in (("0", 0.5, (3, 1.0)), ("1", 1.0, (1, 0.0))):
        pairs = {"a>b": {"rank_1": pair, "mAP": pair / 2, "queries": 4, "gallery": 8}}
        occlusion = {"25": {"queries": level[0], "rank_1": level[1]}}
        made.add(split, (1, 2), protocol="camera-pairs", pairs=pairs, occlusion=occlusion)

    page = Page(write_report(made.write()))

    assert page.row("a → b") == ["a → b", "8", "8", "75.0", "37.5"]
    assert "The smallest gallery of a pair of cameras holds 8 tracklets" in page.text
    assert "there rank-10 and rank-20 of any network is 100 %" in page.text
    assert page.row("in up to 25 % of the frames")[1:4] == ["4", "75.0", "21.7"]


def test_known_occlusion_tells_that_people_are_drawn_even_when_the_data_have_moved(
    tmp_path: Path,
) -> None:
    made = Fabricated(tmp_path).add("0", (1, 1), occlusion={"0": {"queries": 2, "rank_1": 1.0}})
    made.root.rename(tmp_path / "elsewhere")

    page = Page(write_report(made.write()))

    assert "the data are synthetic" in page.text
    assert page.row("hidden in no frame")[1:4] == ["2", "100.0", UNKNOWN]
    assert "2 queries cannot tell this rank-1 from one that is 100 points away" in page.text


def test_only_the_pair_that_was_searched_says_who_was_sought(tmp_path: Path) -> None:
    """The right match of a failure is shown only as seen by the camera that was searched."""
    made = Fabricated(tmp_path, "folder")
    missed = made.ranking(0, 4) | {"pair": "a>c"}
    missed["top"] = missed["top"][:3]
    found = made.ranking(0, 1)
    seen = {**made.tracklet(0, "b"), "camera": "c", "distance": 0.1, "correct": True}
    found = {**found, "rank": 2, "pair": "a>b", "top": [*found["top"], seen]}
    made.add("0", (1, 2), rankings=[missed, found])

    page = Page(write_report(made.write()))

    assert re.findall(r"person sought: (\S+ · \S+)", page.text) == ["1 · c"]


def test_the_same_evaluation_makes_the_same_bytes(tmp_path: Path) -> None:
    output = Fabricated(tmp_path).add("0", (1, 2)).add("1", (2, 1)).write()

    first = _contents(write_report(output))
    stale, foreign = output / "pictures/strip-999.jpg", output / "pictures/notes.txt"
    stale.touch()
    foreign.touch()
    again = _contents(write_report(output))

    foreign_name = foreign.relative_to(output)
    assert again.pop(foreign_name) == b""
    assert again == first


def _contents(page: Path) -> dict[Path, bytes]:
    files = [page, *page.parent.joinpath("pictures").iterdir()]
    return {path.relative_to(page.parent): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("results.json", None, "run `passerby evaluate` first"),
        ("results.json", "{", "could not read"),
        ("results.json", "[]", "expected a JSON object"),
        ("results.json", '{"units": []}', "expected what `passerby evaluate` writes"),
        ("units/0.json", '{"split": "0"}', "expected what `passerby evaluate` writes"),
        ("attention/0.npz", "", "expected"),
    ],
)
def test_what_is_no_evaluation_is_refused(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    output = Fabricated(tmp_path).add("0", (1, 2)).write()
    (output / name).unlink()
    if content is not None:
        (output / name).write_text(content)

    with pytest.raises(EvaluationError, match=message):
        write_report(output)
    assert not (output / "index.html").exists()


def test_a_file_name_that_is_no_text_does_not_stop_the_page(tmp_path: Path) -> None:
    made = Fabricated(tmp_path)
    made.people = ("caf\udce9", *made.people[1:])

    page = Page(write_report(made.add("0", (2, 1)).write()))

    assert "caf?, seen by a" in page.text


def test_the_histogram_counts_what_a_slow_loop_counts(tmp_path: Path) -> None:
    """Queries of camera a against the tested people in the other camera, b."""
    made = Fabricated(tmp_path).add("0", (1, 2, 1))
    output = made.write()
    cache = EmbeddingCache(output / "embeddings" / "kept.npz")
    rng = np.random.default_rng(3)
    # The fourth person is in the cache, but not tested in this split.
    vectors = {
        f"{who}/{camera}": rng.normal(size=5).astype(np.float32)
        for who in "1239"
        for camera in "ab"
    }
    for key, vector in vectors.items():
        cache.add(key, vector)
    cache.save()

    histogram = distance_histogram(read_evaluation(output))

    assert histogram is not None
    away = {
        (one, two): math.dist(vectors[f"{one}/a"], vectors[f"{two}/b"])
        for one in "123"
        for two in "123"
    }
    assert histogram.edges[0] == pytest.approx(min(away.values()))
    assert histogram.edges[-1] == pytest.approx(max(away.values()))
    width = (histogram.edges[-1] - histogram.edges[0]) / len(histogram.genuine)
    for counts, same in ((histogram.genuine, True), (histogram.impostor, False)):
        slow = [0] * len(counts)
        for (one, two), distance in away.items():
            if (one == two) is same:
                place = int((distance - histogram.edges[0]) / width + 1e-9)
                slow[min(place, len(counts) - 1)] += 1
        assert counts.tolist() == slow


def test_an_attention_picture_is_bright_where_the_network_looks(tmp_path: Path) -> None:
    """One frame looks at its upper left cell; so does the sum map."""
    attention = np.zeros((1, 4, 2), np.float32)
    attention[0, 0, 0] = 1

    size = write_attention([placeholder()], attention, attention.sum(axis=0), tmp_path / "a.jpg")

    with Image.open(tmp_path / "a.jpg") as image:
        assert image.size == size
        pixels = np.asarray(image, np.float64).mean(axis=2)
    below = pixels[-CELL_HEIGHT:]
    summed = below[:, -CELL_WIDTH:]
    upper_left = (slice(4, 28), slice(4, 28))
    assert summed[upper_left].min() > 150
    assert summed[36:].max() < 40
    frame = below[:, :CELL_WIDTH]
    assert frame[upper_left].mean() > frame[70:].mean() + 30


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Json:
    """A drawn set, evaluated by an untrained network through the real runner."""
    base = tmp_path_factory.mktemp("evaluated")
    config = preset_set(
        "occluded", None, identities=6, height=64, width=32, frames_min=5, frames_max=6
    )
    write_set(config, base / "data", layout="ilids-vid", jobs=1)
    dataset = read_dataset(base / "data", "ilids-vid")
    torch.manual_seed(0)
    network = TrackletNet(NetworkConfig(backbone="conv5"))
    save_checkpoint(make_checkpoint(network, Preprocessing(height=64, width=32)), base / "net.st")
    task = EvaluationTask(
        base / "net.st", dataset, fingerprint_dataset(dataset), base / "out", splits=("0", "1")
    )
    results = evaluate(task)
    return {**results, "output": base / "out"}


def test_the_page_shows_what_the_runner_measured(evaluated: Json) -> None:
    """Guards the agreement of two modules that meet only in files."""
    page = Page(write_report(evaluated["output"]))

    assert page.row("Mean")[1] == f"{100 * evaluated['mean']['rank_1']:.1f}"
    assert "synthetic tracklets in the layout of iLIDS-VID" in page.text
    assert not page.has_row("This evaluation")
    assert "By occlusion" in page.text
    assert "pictures/distances.svg" in page.all("img", "src")
    assert page.text.count("frames shown; attention is worth") == len(evaluated["attention"]) > 0
    assert "grey boxes" not in page.text


def test_the_command_makes_the_page_again(published: Fabricated) -> None:
    (published.output / "index.html").unlink()

    result = CliRunner().invoke(app, ["report", str(published.output)])

    assert result.exit_code == 0
    assert (published.output / "index.html").is_file()


def test_draws_are_told_apart_by_their_seed(tmp_path: Path) -> None:
    """A network that nobody trained has no other seed to show."""
    made = Fabricated(tmp_path, "folder")
    for seed in (3, 4):
        made.add("0", (2, 1), seed=None, frame_seed=seed, frames="random")

    page = Page(write_report(made.write()))

    assert [row[:2] for row in page.rows if row[0] in ("Split", "0")] == [
        ["Split", "Frame seed"],
        ["0", "3"],
        ["0", "4"],
    ]
    assert "Seeds of drawn frames2: 3, 4" in page.text
    assert "split 0, frame seed 3" in page.text
    assert "Seeds of training" not in page.text


def test_pairs_that_were_left_out_and_names_that_coincide_are_told(tmp_path: Path) -> None:
    made = Fabricated(tmp_path, "folder").add("0", (1, 2))
    made.more = {"pairs_left_out": ["a>c"], "namesakes": 2}

    page = Page(write_report(made.write()))

    assert "1 pair of cameras left out" in page.text
    assert "one person only: a → c" in page.text
    assert "2 names of tested people also occur in the training data of another" in page.text


def test_data_that_are_not_there_leave_the_old_page(tmp_path: Path) -> None:
    output = Fabricated(tmp_path).add("0", (1, 2)).write()
    before = write_report(output).read_bytes()

    result = CliRunner().invoke(app, ["report", str(output), "--data", str(tmp_path / "none")])

    assert isinstance(result.exception, EvaluationError)
    assert "expected the folder of the data" in str(result.exception)
    assert (output / "index.html").read_bytes() == before


def test_the_legend_of_the_curves_stands_above_them(tmp_path: Path) -> None:
    """A low curve runs along the bottom, where the legend used to be."""
    draw_cmc([[0.05 + 0.005 * rank for rank in range(20)]], tmp_path)

    picture = (tmp_path / "cmc.svg").read_text(encoding="utf-8")
    legend = picture[picture.index('id="legend_1"') :]
    heights = [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", legend)]
    frame = picture[picture.index('id="patch_2"') :]
    top = min(float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", frame[:400]))
    assert max(heights[:2]) < top
