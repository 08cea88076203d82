"""How commands show that something long goes on."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def counting(console: Console, *, transient: bool = False) -> Progress:
    """A bar with how many are done and how long the others will take.

    Args:
        console: Where it is drawn.
        transient: Whether it goes when it is full.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=transient,
    )
