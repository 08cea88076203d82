"""The command `passerby`."""

import json
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from index.gallery import GalleryError, GroupBy
from model import cli as model_commands
from model.checkpoint import BUNDLED
from model.errors import ModelError
from service import gallery_cli as gallery_commands
from service import keys_cli as keys_commands
from service import moving as moving_commands
from service.client import DEFAULT_SERVER, Client, ClientError, read_key, read_local
from service.demo import run_demo
from service.enrolment import Outcome, Task, enrol_all, plan_folder
from service.errors import ServiceError
from service.loadtest import run_loadtest
from service.loadtest_sending import LoadPlan
from service.logs import configure_logging
from service.picture import draw_answer
from service.progress import counting
from service.server import run
from service.settings import InvalidSettingsError, Settings

app = typer.Typer(
    name="passerby",
    help="Find a person again: enrol tracklets, then ask who one shows.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for _command in (
    *model_commands.app.registered_commands,
    *gallery_commands.app.registered_commands,
    *moving_commands.app.registered_commands,
    *keys_commands.app.registered_commands,
):
    app.registered_commands.append(_command)
app.add_typer(keys_commands.keys_app)
_console = Console(stderr=True)
_out = Console()

Server = Annotated[str, typer.Option(help="Address of the service.")]
KeyFile = Annotated[
    Path | None, typer.Option(help="File with the key, where the service asks for one.")
]


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    }
)
def serve(context: typer.Context) -> None:
    """Run the service; --help lists its flags, each also a PASSERBY_ variable."""
    settings = Settings.load(context.args)
    configure_logging(settings.log_format)
    run(settings)


@app.command()
def enroll(
    path: Annotated[
        Path,
        typer.Argument(
            help="A folder identity/camera/frames or identity/camera/tracklet/frames; or, with "
            "--identity, --tracklet-id or --single, one tracklet: a folder, a zip, a video."
        ),
    ],
    server: Server = DEFAULT_SERVER,
    identity: Annotated[str | None, typer.Option(help="Who the one tracklet shows.")] = None,
    camera: Annotated[
        list[str] | None,
        typer.Option(help="Camera of the one tracklet; in a folder, enrol only these cameras."),
    ] = None,
    tracklet_id: Annotated[str | None, typer.Option(help="Id of the one tracklet.")] = None,
    single: Annotated[
        bool, typer.Option("--single", help="PATH is one tracklet of nobody in particular.")
    ] = False,
    concurrency: Annotated[int, typer.Option(min=1, max=64, help="Uploads at a time.")] = 4,
    key_file: KeyFile = None,
) -> None:
    """Enrol tracklets; what is already there is skipped."""
    one = single or identity is not None or tracklet_id is not None or not path.is_dir()
    if one:
        given = {"identity": identity, "tracklet_id": tracklet_id, "camera": _only(camera)}
        tasks = [Task(path, {name: value for name, value in given.items() if value is not None})]
    else:
        tasks = plan_folder(path, frozenset(camera) if camera else None)
    with Client(server, read_key(key_file)) as client:
        outcomes, interrupted = _enrol_with_progress(client, tasks, concurrency)
    _report(outcomes, len(tasks))
    if interrupted:
        raise typer.Exit(130)
    if any(outcome.state == "failed" for outcome in outcomes):
        raise typer.Exit(1)


def _only(cameras: list[str] | None) -> str | None:
    if cameras is None or len(cameras) == 0:
        return None
    if len(cameras) > 1:
        raise typer.BadParameter(f"expected one camera for one tracklet, got {len(cameras)}")
    return cameras[0]


def _enrol_with_progress(
    client: Client, tasks: list[Task], concurrency: int
) -> tuple[list[Outcome], bool]:
    """Enrol; the first Ctrl-C lets finish what is under way, the second one ends the process."""
    interrupted = False

    def stop(_: int, __: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, before)
        _console.print("stopping after the uploads that are under way; Ctrl-C again to leave them")

    before = signal.signal(signal.SIGINT, stop)
    outcomes = []
    try:
        with counting(_console) as progress:
            bar = progress.add_task("enrolling", total=len(tasks))
            for outcome in enrol_all(
                client, tasks, concurrency=concurrency, stop=lambda: interrupted
            ):
                outcomes.append(outcome)
                progress.advance(bar)
    finally:
        signal.signal(signal.SIGINT, before)
    return outcomes, interrupted


def _report(outcomes: list[Outcome], planned: int) -> None:
    counts = {
        state: sum(outcome.state == state for outcome in outcomes)
        for state in ("enrolled", "skipped", "failed")
    }
    left = planned - len(outcomes)
    line = ", ".join(f"{count} {state}" for state, count in counts.items())
    _console.print(line + (f", {left} not begun" if left else ""))
    for outcome in sorted(outcomes, key=lambda one: one.task.name):
        if outcome.state == "failed":
            _console.print(f"[red]failed[/] {outcome.task.name}: {outcome.reason}", soft_wrap=True)


@app.command()
def query(
    path: Annotated[
        Path, typer.Argument(help="One tracklet: a folder of frames, an image, a zip or a video.")
    ],
    server: Server = DEFAULT_SERVER,
    top_k: Annotated[int, typer.Option(min=1, max=500, help="Matches at most.")] = 10,
    group_by: Annotated[GroupBy, typer.Option(help="Rank identities or tracklets.")] = "identity",
    camera: Annotated[list[str] | None, typer.Option(help="Only these cameras.")] = None,
    exclude_camera: Annotated[list[str] | None, typer.Option(help="Not these cameras.")] = None,
    max_distance: Annotated[float | None, typer.Option(help="Leave out what is farther.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Ask for attention maps.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw the answer to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as it came.")] = False,
    key_file: KeyFile = None,
) -> None:
    """Ask who a tracklet shows."""
    asked: dict[str, Any] = {"top_k": top_k, "group_by": group_by}
    asked |= {"camera": camera or [], "exclude_camera": exclude_camera or []}
    if max_distance is not None:
        asked["max_distance"] = max_distance
    if explain:
        asked["explain"] = "true"
    local = read_local(path)
    with Client(server, read_key(key_file)) as client:
        answer = client.query(local, asked)
        if picture is not None:
            strips = [client.strip(one["tracklet"]["tracklet_id"]) for one in answer["matches"]]
            draw_answer(local, path.resolve().name, answer, strips, picture)
    if as_json:
        sys.stdout.write(json.dumps(answer) + "\n")
    else:
        _print_answer(answer)
    if picture is not None:
        _console.print(f"picture: {picture}")


def _print_answer(answer: dict[str, Any]) -> None:
    table = Table()
    for column in ("rank", "identity", "distance", "camera", "tracklet"):
        table.add_column(column, justify="right" if column in ("rank", "distance") else "left")
    for match in answer["matches"]:
        record = match["tracklet"]
        table.add_row(
            str(match["rank"]),
            match["identity"] or "unnamed",
            f"{match['distance']:.3f}",
            record["camera"] or "",
            record["tracklet_id"],
        )
    _out.print(table)
    if answer["decision"] is not None:
        _out.print(f"decision: {answer['decision']} (threshold {answer['threshold']})")
    used, received = answer["frames"]["used"], answer["frames"]["received"]
    total = answer["timing_ms"]["total"]
    _out.print(
        f"{used} of {received} frames, {answer['searched']} tracklets searched, {total:.0f} ms"
    )


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for tracklets and picture.")] = Path("demo"),
    identities: Annotated[int, typer.Option(min=2, max=400, help="How many people.")] = 12,
    seed: Annotated[int, typer.Option(min=0, help="Of the drawing.")] = 0,
    weights: Annotated[
        str, typer.Option(help="Checkpoint to serve: a file, or bundled, or untrained.")
    ] = BUNDLED,
) -> None:
    """Draw people, enrol them from one camera, find them again in another."""
    run_demo(output, identities, seed, _out, weights)


@app.command()
def bench(
    path: Annotated[
        Path | None,
        typer.Argument(
            help="One tracklet, or a folder identity/camera/frames of many; drawn ones without it."
        ),
    ] = None,
    server: Server = DEFAULT_SERVER,
    rate: Annotated[float | None, typer.Option(help="Requests a second; 5 by default.")] = None,
    rates: Annotated[
        str | None, typer.Option(help="Several rates one after the other, like 1,2,4,8.")
    ] = None,
    duration: Annotated[float, typer.Option(min=1, help="Seconds that count, each rate.")] = 60,
    warmup: Annotated[float, typer.Option(min=0, help="Seconds before them that do not.")] = 5,
    route: Annotated[Literal["query", "embed"], typer.Option(help="What to ask.")] = "query",
    tracklets: Annotated[int, typer.Option(min=1, help="Taken of PATH at most, by lot.")] = 64,
    gallery_check: Annotated[
        int, typer.Option(min=0, help="Refuse to begin with fewer tracklets stored.")
    ] = 0,
    max_open: Annotated[
        int, typer.Option(min=1, max=4096, help="Requests under way at most.")
    ] = 512,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait for an answer.")] = 120,
    seed: Annotated[int, typer.Option(min=0, help="Of arrivals and drawn tracklets.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for results.json and latency.png.")] = Path(
        "report"
    ),
    key_file: KeyFile = None,
) -> None:
    """Measure a running service: requests at a given rate, and how long their answers take."""
    plan = LoadPlan(
        route=route,
        rates=_read_rates(rate, rates),
        duration_s=duration,
        warmup_s=warmup,
        seed=seed,
        max_open=max_open,
        timeout_s=timeout,
    )
    finished = run_loadtest(
        server,
        path,
        plan,
        output=output,
        console=_out,
        key=read_key(key_file),
        most_tracklets=tracklets,
        least_gallery=gallery_check,
    )
    if not finished:
        raise typer.Exit(130)


def _read_rates(rate: float | None, rates: str | None) -> tuple[float, ...]:
    if rate is not None and rates is not None:
        raise typer.BadParameter("expected --rate or --rates, got both")
    text = rates if rates is not None else str(5.0 if rate is None else rate)
    try:
        found = tuple(float(word) for word in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"expected numbers like 1,2,4,8, got {text!r}") from error
    if not all(0 < one <= 10_000 for one in found):  # NaN is not either
        raise typer.BadParameter(f"expected rates in (0, 10000], got {text!r}")
    return found


def main() -> None:
    """Run the command; an expected error is one line and status 1."""
    try:
        app()
    except (ClientError, ServiceError, ModelError, GalleryError, InvalidSettingsError) as error:
        _console.print(f"[red]passerby:[/] {error}", soft_wrap=True, highlight=False)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
