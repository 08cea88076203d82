"""The page of an evaluation: its numbers, its pictures, and what the paper published beside them.

A page is made of what `model.evaluation_runner` wrote and of nothing else, so that it can be made
again at any time; only the frames it shows come from the data, and it does without those that have
moved.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from model import anchors
from model.anchors import Benchmark, Figures
from model.errors import EvaluationError
from model.evaluation_files import write_aside
from model.report_cards import Cards
from model.report_data import Evaluation, read_evaluation
from model.report_distances import distance_histogram
from model.report_facts import benchmark_of, describe, layout_name, percent, warn
from model.report_pictures import Reference, draw_cmc, draw_distances

_PUBLISHED_SPLITS = 10  # of either benchmark; the paper's figures are means over them


def write_report(output: Path, data: Path | None = None) -> Path:
    """Write the page of an evaluation, with its pictures; an older page is replaced.

    Args:
        output: Folder that `passerby evaluate` wrote.
        data: Where the data lie now, if they have moved since.

    Returns:
        ``output/index.html``.

    Raises:
        EvaluationError: The folder holds no finished evaluation, a file of it is damaged, or the
            page cannot be written.
    """
    evaluation = read_evaluation(output, data)
    pictures = output / "pictures"
    try:
        pictures.mkdir(exist_ok=True)
        cards = Cards(evaluation, pictures)
        page = describe(evaluation) | _compare(evaluation) | _draw_charts(evaluation, cards)
        page |= {
            "failures": cards.failures(),
            "successes": cards.successes(),
            "attention": cards.attention(),
        }
        page["warnings"] = warn(evaluation, cards.frames, cards.missing)
        with write_aside(output / "index.html") as draft:
            # A file name that is no text becomes "?", as everywhere on paper.
            draft.write_bytes(_render(page).encode("utf-8", "replace"))
        _drop_old(pictures, cards.written)
    except OSError as error:
        raise EvaluationError(f"could not write {output}: {error.strerror or error}") from error
    return output / "index.html"


def _render(page: Mapping[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("model"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["with_indices"] = _with_indices
    return environment.get_template("report.html").render(page)


def _with_indices(text: str) -> Markup:
    """Write ``L_v`` and ``L_f`` of the paper's names as letters with an index."""
    written = escape(text)
    for letter in ("v", "f"):
        written = written.replace(f"L_{letter}", Markup("<i>L</i><sub>{}</sub>").format(letter))
    return written


def _drop_old(folder: Path, kept: set[Path]) -> None:
    """Remove the pictures of an older page, and nothing that may be somebody else's."""
    for kind in ("strip-*.jpg", "attention-*.jpg", "cmc*.svg", "distances*.svg"):
        for path in set(folder.glob(kind)) - kept:
            path.unlink()


def _draw_charts(evaluation: Evaluation, cards: Cards) -> dict[str, Any]:
    cards.written |= draw_cmc(
        [unit.cmc for unit in evaluation.units], cards.folder, _reference(evaluation)
    )
    histogram = distance_histogram(evaluation)
    if histogram is not None:
        cards.written |= draw_distances(histogram, cards.folder)
    rank_1, rank_20 = evaluation.mean["rank_1"], evaluation.mean["rank_20"]
    return {
        "cmc_alt": f"Curve of the share of queries with a right match within rank k: "
        f"{percent(rank_1)} at rank 1, {percent(rank_20)} at rank 20.",
        "histogram": histogram,
    }


def _reference(evaluation: Evaluation) -> Reference | None:
    """The paper's points on the curve, where they may be compared."""
    if _obstacles(evaluation):
        return None
    figures = _published(anchors.TABLE_1[-1], benchmark_of(evaluation))
    named = ((1, figures.rank_1), (5, figures.rank_5), (10, figures.rank_10), (20, figures.rank_20))
    return Reference("the paper", {rank: rate for rank, rate in named if rate is not None})


def _published(row: anchors.AblationRow, benchmark: Benchmark | None) -> Figures:
    return row.ilids_vid if benchmark == "ilids-vid" else row.prid_2011


def _compare(evaluation: Evaluation) -> dict[str, Any]:
    benchmark = benchmark_of(evaluation)
    obstacles = _obstacles(evaluation)
    return {
        "comparable": "" if obstacles else _comparable(evaluation),
        "reasons": obstacles,
        "benchmark": benchmark,
        "benchmarks": anchors.BENCHMARKS,
        "blank": Figures(None),
        "own_remark": _own_remark(evaluation),
        "table_1": anchors.TABLE_1,
        "table_1_notes": anchors.TABLE_1_NOTES,
        "comparisons": [
            {
                "number": number,
                "benchmark": name,
                "name": anchors.BENCHMARK_NAMES[name],
                "rows": anchors.COMPARISONS[name],
                "notes": anchors.COMPARISON_NOTES[name],
            }
            for number, name in enumerate(anchors.BENCHMARKS, start=2)
        ],
    }


def _obstacles(evaluation: Evaluation) -> list[str]:
    """Say why our figures may not stand beside the paper's; nothing where they may."""
    found = []
    if evaluation.is_drawn:
        found.append("the data are synthetic: drawn people, of whom nobody else has figures")
    elif benchmark_of(evaluation) is None:
        found.append(
            f"the data are {layout_name(evaluation)}, and the paper measured on iLIDS-VID and "
            "PRID-2011: other people, other cameras, another number of queries"
        )
    if evaluation.is_drawn is None:
        found.append(
            "the data are no longer where they were, so this page cannot tell real ones from "
            "synthetic ones"
        )
    drawn = [source for source in evaluation.sources if not source.startswith("published")]
    if drawn:
        found.append(f"the splits are not the published ones, but: {'; '.join(drawn)}")
    if evaluation.option("protocol") != "published":
        found.append(f"the protocol is not the published one, but {evaluation.option('protocol')}")
    if int(evaluation.results.get("seen_identities") or 0):
        found.append("the checkpoint was trained on people who are tested")
    return found


def _comparable(evaluation: Evaluation) -> str:
    return (
        f"This is {layout_name(evaluation)} with the published splits as far as file names and "
        "counts tell; nothing here can check pictures or the split file's content. If it is, the "
        f"rows \u201cThis evaluation\u201d may be read beside the paper's: "
        f"{_own_remark(evaluation)}."
    )


def _own_remark(evaluation: Evaluation) -> str:
    """What a reader must know to compare our row."""
    splits = len({unit.split for unit in evaluation.units})
    told = [f"{splits} of {_PUBLISHED_SPLITS} published splits"]
    queries = max(unit.queries for unit in evaluation.units)
    told.append(f"{queries} queries in each")
    told.append(f"{evaluation.option('frames')} frames")
    clip_frames = int(evaluation.option("clip_frames") or 15)
    if clip_frames != 15:
        told.append(f"clips of {clip_frames} frames and not of 15")
    if evaluation.option("unit"):
        told.append("embeddings scaled to length 1, which the paper's are not said to be")
    if evaluation.option("reranked"):
        told.append("re-ranked, which the paper is not")
    return ", ".join(told)
