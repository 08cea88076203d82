"""Commands of the model package; `service.cli` mounts them under `passerby`."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import Progress

from model.checkpoint import (
    StoredPrecision,
    backbone_checkpoint,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    untrained_checkpoint,
)
from model.datasets.checking import check_dataset
from model.datasets.presets import Preset, Size, preset_set
from model.datasets.showing import show_report
from model.datasets.synthetic import SyntheticSet, write_set
from model.datasets.writing import DrawnLayout
from model.embedder import Precision
from model.evaluation import Frames, ProtocolName
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
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint to export, or bundled.")],
    output: Annotated[Path, typer.Argument(help="File to write, .onnx or .pt2.")],
    file_format: Annotated[
        Literal["onnx", "torch"] | None,
        typer.Option("--format", help="Where the name does not say it."),
    ] = None,
) -> None:
    """Write a checkpoint's network for other runtimes, checked against it."""
    from model.export import export_checkpoint  # it imports much that no other command needs

    loaded = load_checkpoint(find_checkpoint(checkpoint))
    with _console.status("exporting and checking"):
        exported = export_checkpoint(loaded, output, file_format)
    shapes = ", ".join(f"{batch}x{frames}" for batch, frames in exported.shapes)
    _console.print(
        f"wrote {output}: model {loaded.fingerprint} as {exported.file_format}; checked with "
        f"tracklets x frames {shapes}, largest relative difference {exported.difference:.1e}"
    )


@app.command()
def quantise(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint to round, or bundled.")],
    output: Annotated[Path, typer.Option(help="8-bit checkpoint to write.")],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of tracklets to calibrate on and to compare with; drawn people without "
            "it.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the frames that are looked at.")] = 0,
) -> None:
    """Make an 8-bit checkpoint for a CPU; it is another model, and kept only if it holds."""
    from model.quantisation import quantise_file  # it imports what no other command needs

    loaded = load_checkpoint(find_checkpoint(checkpoint))
    with _console.status("rounding and comparing"):
        saved, agreement = quantise_file(loaded, output, data=data, seed=seed)
    found = ""
    if agreement.rank_1 is not None:
        found = (
            f"; rank-1 {agreement.rank_1:.1%} (before {agreement.rank_1_before:.1%}), mAP "
            f"{agreement.mean_average_precision:.1%} (before "
            f"{agreement.mean_average_precision_before:.1%}) of {agreement.queries} queries"
        )
    _console.print(
        f"wrote {output}: model {saved.fingerprint} of {loaded.fingerprint}; embeddings differ by "
        f"{agreement.error:.1%}, at most {agreement.largest_error:.1%}{found}",
        soft_wrap=True,
    )


@app.command("check-data")
def check_data(
    data: Annotated[Path, typer.Argument(help="Folder of a data set.")],
    layout: Annotated[
        Literal["auto", "folder", "ilids-vid", "prid-2011", "mars", "market-1501", "mixed"],
        typer.Option(help="How it is laid out; auto recognises it."),
    ] = "auto",
    no_decode: Annotated[
        bool, typer.Option("--no-decode", help="Look at names and sizes; open no frame.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="List every place of each finding.")
    ] = False,
) -> None:
    """Say what a data set holds, and what is missing or odd; status 1 on any error."""
    with Progress(console=_console, transient=True) as progress:
        task = progress.add_task("looking at frames", total=None)
        report = check_dataset(
            data,
            layout,
            decode=not no_decode,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2))
    else:
        show_report(report, Console(), most=None if everything else 10)
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def synth(
    output: Annotated[Path, typer.Argument(help="Folder to write; new or empty.")],
    preset: Annotated[Preset | None, typer.Option(help="What is hard in it.")] = None,
    size: Annotated[
        Size | None, typer.Option(help="Identities and frame size by a name; or singly, as below.")
    ] = None,
    layout: Annotated[DrawnLayout, typer.Option(help="How it lies on disk.")] = "folder",
    identities: Annotated[
        int | None, typer.Option(min=1, help="How many people; 24 by default.", show_default=False)
    ] = None,
    cameras: Annotated[int, typer.Option(min=1, help="How many cameras see each.")] = 2,
    height: Annotated[
        int | None, typer.Option(help="Rows of a frame; 192 by default.", show_default=False)
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="Columns of a frame; 96 by default.", show_default=False)
    ] = None,
    frames_min: Annotated[
        int | None, typer.Option(help="Fewest frames of a tracklet.", show_default=False)
    ] = None,
    frames_max: Annotated[
        int | None, typer.Option(help="Most frames of a tracklet.", show_default=False)
    ] = None,
    occluded: Annotated[
        float | None,
        typer.Option(help="Share of the tracklets with an occluder.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides everything that is drawn.")] = 0,
    masks: Annotated[bool, typer.Option(help="Write which pixel is whose.")] = True,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that draw; as many as pay by default."),
    ] = None,
) -> None:
    """Draw synthetic tracklets: identity/camera/frames, or a published layout with its splits."""
    try:
        config = preset_set(
            preset,
            size,
            identities=identities,
            cameras=cameras,
            height=height,
            width=width,
            frames_min=frames_min,
            frames_max=frames_max,
            occluded_share=occluded,
            seed=seed,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    draw_to(config, output, _console, layout=layout, masks=masks, jobs=jobs)
    _console.print(f"wrote {config.identities * config.cameras} tracklets to {output}")


def draw_to(
    config: SyntheticSet,
    output: Path,
    console: Console,
    *,
    layout: DrawnLayout = "folder",
    masks: bool = False,
    jobs: int | None = None,
) -> None:
    """Write a drawn set, showing progress.

    Raises:
        DatasetError: The folder is not empty or cannot be written, or the layout has another
            number of cameras.
    """
    total = config.identities * config.cameras
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("drawing tracklets", total=total)
        write_set(
            config,
            output,
            layout=layout,
            masks=masks,
            jobs=jobs,
            progress=lambda done, _: progress.update(task, completed=done),
        )


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A TOML file, or the name of a bundled recipe.")],
    data: Annotated[Path, typer.Option(help="Folder of the tracklets.")],
    output: Annotated[Path, typer.Option(help="Folder of the run; the same again goes on.")],
    splits: Annotated[str, typer.Option(help="Which splits: 0, or 0,3, or 0-9.")] = "0",
    seeds: Annotated[str, typer.Option(help="One run for each of these, as splits.")] = "0",
    split_seed: Annotated[int, typer.Option(min=0, help="Of random halves.")] = 0,
    start: Annotated[
        str | None,
        # Several names, because torchrun takes --start for one of its own.
        typer.Option(
            "--start",
            "--init",
            "--weights",
            help="To begin with, instead of the recipe's; bundled for what comes with Passerby.",
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change the recipe: optimiser.epochs=50. Repeatable."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    save_every: Annotated[float, typer.Option(min=0, help="Seconds between saved states.")] = 120.0,
) -> None:
    """Train on tracklets; a run that was interrupted goes on exactly where it was."""
    from model.errors import DatasetError, InvalidFramesError
    from model.evaluation_plan import read_seeds
    from model.experiment import choose_splits, plan_experiment
    from model.recipe import load_recipe
    from model.training_console import train_all

    overrides = list(setting or [])
    if start is not None:
        overrides.append(f"start={json.dumps(start)}")
    experiment = plan_experiment(load_recipe(recipe, overrides), data, split_seed=split_seed)
    chosen, numbers = choose_splits(experiment.dataset, splits), read_seeds(seeds)
    try:
        stopped_by = train_all(
            experiment, chosen, numbers, output, _console, device=device, save_every_s=save_every
        )
    except InvalidFramesError as error:
        raise DatasetError(f"{error}; `passerby check-data` lists all such frames") from error
    if stopped_by is not None:
        raise typer.Exit(128 + stopped_by)


@app.command()
def evaluate(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A checkpoint; bundled, for the one that comes with Passerby; a run folder, "
            "evaluated on the split it was trained on; or a folder of run folders, each on its own."
        ),
    ],
    data: Annotated[Path, typer.Option(help="Folder of the data set.")],
    layout: Annotated[
        Literal["auto", "folder", "ilids-vid", "prid-2011", "mars", "market-1501"],
        typer.Option(help="How the data lie on disk."),
    ] = "auto",
    splits: Annotated[
        str | None,
        typer.Option(
            help="Which: 0, 0,3 or 0-9; or `unseen`: everybody whom the checkpoint was not trained "
            "on, in a folder or in plain crops. All without it.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Of --frames random: 0, 0,1 or 0-4.")] = "0",
    frames: Annotated[
        Frames, typer.Option(help="Of a tracklet: --clip-frames evenly, all in clips, or drawn.")
    ] = "even",
    clip_frames: Annotated[int, typer.Option(min=1, help="Frames of a clip.")] = 15,
    protocol: Annotated[
        ProtocolName,
        typer.Option(help="auto: the published one of a benchmark, camera pairs for a folder."),
    ] = "auto",
    rerank: Annotated[bool, typer.Option("--rerank", help="By k-reciprocal neighbours.")] = False,
    unit: Annotated[bool, typer.Option("--unit", help="Compare vectors of length 1.")] = False,
    prid_subset: Annotated[
        Literal["178", "all200"], typer.Option(help="Of PRID-2011: which people.")
    ] = "178",
    split_seed: Annotated[
        int, typer.Option(min=0, help="Of random halves, where no splits are published.")
    ] = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write; without it `evaluation` in the folder of the run or runs, and "
            "`NAME-evaluation` beside a checkpoint NAME.safetensors.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    precision: Annotated[Precision, typer.Option(help="Of the backbone.")] = "auto",
    allow_seen: Annotated[
        bool, typer.Option("--allow-seen", help="Test people that were trained on, and say so.")
    ] = False,
) -> None:
    """Measure a network by the published protocols; interrupted, the same command goes on."""
    from model.datasets.layouts import fingerprint_dataset, read_dataset
    from model.evaluation import ClipChoice
    from model.evaluation_console import run_task
    from model.evaluation_plan import EvaluationOptions, EvaluationTask, read_choice, read_seeds

    source = find_checkpoint(checkpoint)
    if output is None and source.is_dir():
        output = source / "evaluation"
    dataset = read_dataset(data, layout, seed=split_seed, prid_subset=prid_subset)
    task = EvaluationTask(
        source,
        dataset,
        fingerprint_dataset(dataset),
        output or checkpoint.with_name(f"{checkpoint.stem}-evaluation"),
        EvaluationOptions(ClipChoice(frames, clip_frames), protocol, rerank, unit, allow_seen),
        splits=None if splits is None else read_choice(splits),
        seeds=read_seeds(seeds),
        device=device,
        precision=precision,
    )
    stopped_by = run_task(task, _console)
    if stopped_by is not None:
        raise typer.Exit(128 + stopped_by)


@app.command()
def report(
    evaluation: Annotated[Path, typer.Argument(help="Folder that `passerby evaluate` wrote.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Where the data lie now, if they have moved.", show_default=False),
    ] = None,
) -> None:
    """Make the page of an evaluation again."""
    from model.report import write_report  # it imports what no other command needs

    _console.print(f"wrote {write_report(evaluation, data)}", soft_wrap=True, markup=False)
