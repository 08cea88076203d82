"""What the paper and its neighbours published: the figures a report prints beside ours.

Wang and Zhao, *Temporal Regularized Spatial Attention for Video-based Person Re-identification*,
Tables 1 and 2. Table 3 holds no values in the copy we have, so its rows come from elsewhere, and
each says from where.
"""

from dataclasses import dataclass
from typing import Literal, get_args

Benchmark = Literal["ilids-vid", "prid-2011"]
BENCHMARKS: tuple[Benchmark, ...] = get_args(Benchmark)
BENCHMARK_NAMES: dict[Benchmark, str] = {"ilids-vid": "iLIDS-VID", "prid-2011": "PRID-2011"}


@dataclass(frozen=True, slots=True)
class Figures:
    """CMC and mAP as published, in percent; None where nothing is known.

    Args:
        rank_1: Share of queries whose nearest gallery tracklet is right, likewise the next three.
        rank_5: See ``rank_1``.
        rank_10: See ``rank_1``.
        rank_20: See ``rank_1``.
        mean_ap: Mean average precision.
    """

    rank_1: float | None
    rank_5: float | None = None
    rank_10: float | None = None
    rank_20: float | None = None
    mean_ap: float | None = None


@dataclass(frozen=True, slots=True)
class AblationRow:
    """One row of Table 1.

    Args:
        model: As the table names it; ``L_v`` and ``L_f`` stand for the letters with an index.
        ilids_vid: On iLIDS-VID.
        prid_2011: On PRID-2011.
    """

    model: str
    ilids_vid: Figures
    prid_2011: Figures


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """One row of a comparison with other methods.

    Args:
        method: Its short name.
        venue: Where and when it appeared.
        figures: As published.
        source: Where we read the figures.
        remark: What a reader must know to compare them; "" where nothing.
        is_paper: Whether this is the paper's own row.
    """

    method: str
    venue: str
    figures: Figures
    source: str
    remark: str = ""
    is_paper: bool = False


TABLE_1 = (
    AblationRow(
        "Baseline", Figures(61.2, 85.3, 91.2, 94.5, 74.0), Figures(84.3, 96.6, 97.2, 98.9, 87.4)
    ),
    AblationRow(
        "Baseline + L_v",
        Figures(68.6, 88.7, 90.4, 94.8, 77.7),
        Figures(88.0, 97.2, 97.8, 99.5, 89.7),
    ),
    AblationRow(
        "Baseline + L_v + SAM",
        Figures(73.5, 91.4, 92.0, 96.0, 81.2),
        Figures(91.0, 97.5, 98.5, 99.8, 92.3),
    ),
    AblationRow(
        "Baseline + L_v + SAM + Reg",
        Figures(81.3, 94.1, 96.0, 98.7, 86.2),
        Figures(91.3, 98.9, 99.9, 100.0, 93.2),
    ),
    AblationRow(
        "Baseline + L_f + SAM + Reg",
        Figures(82.7, 95.5, 98.7, 99.3, 87.9),
        Figures(92.1, 98.8, 100.0, 100.0, 94.1),
    ),
)

_TABLE_2 = "the paper, Table 2"
_LEADERBOARD = "leaderboard of AsuradaYuci/awesome_video_person_reid"

COMPARISONS: dict[Benchmark, tuple[ComparisonRow, ...]] = {
    "ilids-vid": (
        ComparisonRow("STA", "ICCV 2015", Figures(44.3, 71.7, 83.7, 91.7), _TABLE_2),
        ComparisonRow("TDL", "CVPR 2016", Figures(56.3, 87.6, 95.6, 98.3), _TABLE_2),
        ComparisonRow("RNN", "CVPR 2016", Figures(58.0, 84.0, 91.0, 96.0), _TABLE_2),
        ComparisonRow("ASTPN", "ICCV 2017", Figures(62.0, 86.0, 94.0, 98.0), _TABLE_2),
        # Our copy of the paper reads "OAN" and "ROEN": its references 10 and 11 are QAN and RQEN.
        ComparisonRow("QAN", "CVPR 2017", Figures(68.0, 86.8, 95.4, 97.4), _TABLE_2),
        ComparisonRow(
            "RQEN",
            "AAAI 2018",
            Figures(76.1, 92.9, 97.5, 99.3),
            _TABLE_2,
            "the leaderboard has 77.1 / 93.2 / 97.7 / 99.4",
        ),
        ComparisonRow("STAN", "CVPR 2018", Figures(80.2), _TABLE_2),
        ComparisonRow(
            "The paper",
            "",
            Figures(82.7, 95.3, 98.7, 99.3),
            _TABLE_2,
            "rank-5 is 95.3 here and 95.5 in Table 1; mAP 87.9 only in Table 1",
            is_paper=True,
        ),
        ComparisonRow(
            "Snippet",
            "CVPR 2018",
            Figures(85.4, 96.7, 98.8, 99.5),
            _LEADERBOARD,
            "uses optical flow; not in the paper's table",
        ),
        ComparisonRow(
            "KeyRe-ID",
            "Pattern Recognition 2026",
            Figures(93.3),
            "its README",
            "mean of three seeds; its preprint said 96.0",
        ),
        ComparisonRow(
            "CLIMB-ReID",
            "AAAI 2025",
            Figures(96.7, 99.9),
            "its Table 1",
            "the highest found",
        ),
    ),
    "prid-2011": (
        ComparisonRow("RQEN", "AAAI 2018", Figures(91.8, 98.4, 99.3, 99.8), _LEADERBOARD),
        ComparisonRow("STAN", "CVPR 2018", Figures(93.2), _LEADERBOARD),
        ComparisonRow(
            "The paper",
            "",
            Figures(92.1, 98.8, 100.0, 100.0, 94.1),
            "the paper, Table 1",
            "its Table 3 holds no values in our copy",
            is_paper=True,
        ),
        ComparisonRow(
            "Snippet",
            "CVPR 2018",
            Figures(93.0, 99.3, 100.0, 100.0),
            _LEADERBOARD,
            "uses optical flow",
        ),
        ComparisonRow(
            "KeyRe-ID",
            "Pattern Recognition 2026",
            Figures(97.4),
            "its README",
            "mean of three seeds; the highest found",
        ),
    ),
}

TABLE_1_NOTES = (
    "The last row still holds L_v: L_f replaces the cross-entropy, not the triplet loss.",
    "Rank-5 of the full model on iLIDS-VID is 95.5 in Table 1 and 95.3 in Table 2.",
    (
        "One split is a coarse measure: the binomial standard error at 82.7 with 150 queries is "
        "3.1 points, at 91.3 with 89 queries 3.0. The last steps on PRID-2011 (+0.3, +0.8) are "
        "smaller than what ten overlapping splits can resolve."
    ),
    (
        "Rank-20 of 99.5 on PRID-2011 cannot come from ten splits of 89 queries (885 of 890 is "
        "99.4, 886 is 99.6), but can from ten of 100: the paper may have used all 200 people "
        "instead of the customary 178."
    ),
)

COMPARISON_NOTES: dict[Benchmark, tuple[str, ...]] = {
    "ilids-vid": (
        "The text claims 4.1 points more than STAN; the table says 82.7 - 80.2 = 2.5.",
        "Snippet, of the same year as STAN, is higher than the paper and missing from its table.",
    ),
    "prid-2011": (
        (
            "Table 3 is an empty box in our copy of the paper. Its own row is taken from Table 1; "
            "the others from where the last column says."
        ),
        "The text agrees with these rows: it calls the paper slightly lower than STAN here.",
    ),
}
