"""What tells, while training goes on, that it will come to nothing."""

from collections.abc import Mapping

SATURATED_CELLS = 1.5
UNIFORM_SHARE = 0.98
STUCK_SHARE = 0.02
RISING = 1.0
PATIENCE = 5


class HealthWatch:
    """Turns the logged averages into warnings, each at most once.

    A warning needs ``PATIENCE`` logged windows in a row, so that one odd batch does not raise it.

    Args:
        cells: H * W of the attention maps.
        margin: Of the triplet loss; None without one.
        has_attention: Whether the maps are anything but uniform by construction.
    """

    def __init__(self, cells: int, margin: float | None, *, has_attention: bool) -> None:
        self._cells = cells
        self._margin = margin
        self._has_attention = has_attention
        self._rows: dict[str, int] = {}
        self._first_wrong: float | None = None
        self._said: set[str] = set()

    def look(self, window: Mapping[str, float]) -> list[str]:
        """Look at one logged window.

        Args:
            window: Averages by name, as `model.training` logs them.

        Returns:
            New warnings, in words.
        """
        signs = {
            kind: text for kind, text in (self._attention(window), self._triplet(window)) if kind
        }
        kind, text = self._logits(window)
        signs |= {kind: text} if kind else {}
        new = []
        self._rows = {kind: self._rows.get(kind, 0) + 1 for kind in signs}
        for kind, text in signs.items():
            if self._rows[kind] >= PATIENCE and kind not in self._said:
                self._said.add(kind)
                new.append(text)
        return new

    def _attention(self, window: Mapping[str, float]) -> tuple[str, str]:
        positions = window["effective_positions"]
        if not self._has_attention:
            return "", ""
        if positions < SATURATED_CELLS:
            return "saturated", (
                f"attention saturates: {positions:.2f} effective cells of {self._cells}; the "
                "regulariser has no gradient there. A temperature of "
                '"std" is scale-free'
            )
        if positions > UNIFORM_SHARE * self._cells:
            return "uniform", (
                f"attention has collapsed to uniform: {positions:.1f} effective cells of "
                f"{self._cells}, which is plain average pooling"
            )
        return "", ""

    def _triplet(self, window: Mapping[str, float]) -> tuple[str, str]:
        if self._margin is None or "triplet" not in window:
            return "", ""
        loss, margin = window["triplet"], self._margin
        if abs(loss - margin) < STUCK_SHARE * margin and window["positive"] < margin:
            return "stuck", (
                f"the triplet loss sticks at the margin ({loss:.3f} of {margin:g}): embeddings "
                "collapse to a point, or are much shorter than the margin. Lower the rate, or use "
                'pool = "sum"'
            )
        return "", ""

    def _logits(self, window: Mapping[str, float]) -> tuple[str, str]:
        wrong = window.get("wrong_logit")
        if wrong is None:
            return "", ""
        if self._first_wrong is None:
            self._first_wrong = wrong
        if wrong > 0 and wrong - self._first_wrong > RISING:
            return "rising", (
                f"wrong-class logits rise together (mean {wrong:.2f}): the identity loss does not "
                "tell identities apart, as Eq. 8 as printed cannot"
            )
        return "", ""
