"""Commands of the model package; `service.cli` mounts them under `passerby`."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import Progress

from model.checkpoint import (
    StoredPrecision,
    backbone_checkpoint,
    save_checkpoint,
    untrained_checkpoint,
)
from model.datasets.synthetic import SyntheticSet, write_folder
from model.network import Attention, NetworkConfig, Pool

app = typer.Typer()
_console = Console(stderr=True)


def read_temperature(text: str) -> float | Literal["std"]:
    """Read ``std`` or a number.

    Raises:
        BadParameter: It is neither.
    """
    if text == "std":
        return "std"
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f'expected a positive number or "std", got {text!r}') from error


@app.command()
def init(
    output: Annotated[Path, typer.Option(help="Checkpoint to write.")],
    backbone: Annotated[
        str | None,
        typer.Option(
            help="ResNet-50 state dict with torchvision's names (.safetensors or .pth), or "
            "IMAGENET1K_V1 to download torchvision's. Untrained, seeded weights without it."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of untrained weights.")] = 0,
    attention: Annotated[Attention, typer.Option(help="Reading of Eq. 1-2.")] = "softmax",
    temperature: Annotated[str, typer.Option(help='Of the softmax: a number or "std".')] = "std",
    pool: Annotated[Pool, typer.Option(help="Weighted sum or the printed mean.")] = "sum",
    precision: Annotated[StoredPrecision, typer.Option(help="Of the stored weights.")] = "fp32",
) -> None:
    """Make a checkpoint from a ResNet-50."""
    try:
        config = NetworkConfig(attention, read_temperature(temperature), pool)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if backbone is None:
        checkpoint = untrained_checkpoint(seed, config)
    else:
        checkpoint = backbone_checkpoint(backbone, config)
    saved = save_checkpoint(checkpoint, output, precision=precision)
    _console.print(f"wrote {output}: model {saved.fingerprint}")


@app.command()
def synth(
    output: Annotated[Path, typer.Argument(help="Folder to write; new or empty.")],
    identities: Annotated[int, typer.Option(min=1, help="How many people.")] = 24,
    cameras: Annotated[int, typer.Option(min=1, help="How many cameras see each.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Decides everything that is drawn.")] = 0,
) -> None:
    """Draw synthetic tracklets as identity/camera/frames."""
    config = SyntheticSet(identities=identities, cameras=cameras, seed=seed)
    draw_to(config, output, _console)
    _console.print(f"wrote {identities * cameras} tracklets to {output}")


def draw_to(config: SyntheticSet, output: Path, console: Console) -> None:
    """Write a drawn set, showing progress.

    Raises:
        DatasetError: The folder is not empty.
    """
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("drawing tracklets", total=config.identities * config.cameras)
        write_folder(config, output, lambda done, _: progress.update(task, completed=done))
