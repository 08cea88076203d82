"""An exported file embeds as the network does, or there is none."""

import copy
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from model import export as exporting
from model.checkpoint import Checkpoint, make_checkpoint, save_checkpoint, untrained_checkpoint
from model.cli import app
from model.embedder import Embedder
from model.errors import ExportError
from model.export import (
    CHECKED_SHAPES,
    TOLERANCE,
    choose_format,
    export_checkpoint,
    relative_difference,
)
from model.frames import Preprocessing, read_clip
from model.network import NetworkConfig

ROOT = Path(__file__).parent.parent.parent
SIZE = Preprocessing(height=64, width=32)
EXAMPLES = re.findall(
    r"^```python\n(.*?)^```",
    (ROOT / "docs" / "export.md").read_text("utf-8"),
    re.MULTILINE | re.DOTALL,
)
EVERYTHING = {"head": 24, "temporal": "agreement", "unit": True, "neck": True}
Run = Callable[[Tensor, Tensor], NDArray[np.float32]]


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


needs_onnx = pytest.mark.skipif(
    not all(installed(name) for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs the extra export",
)
needs_openvino = pytest.mark.skipif(not installed("openvino"), reason="needs the extra openvino")


def make(*, seed: int = 0, **config: Any) -> Checkpoint:
    """A small network whose batch normalisations do something."""
    network = untrained_checkpoint(seed, NetworkConfig(backbone="conv5", **config)).network
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if name.endswith(("running_var", "bn1.weight", "neck.weight")):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        if name.endswith(("running_mean", "bn1.bias")):
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
    return make_checkpoint(network, SIZE)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return make()


@pytest.fixture(scope="module")
def onnx_file(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "network.onnx"
    assert export_checkpoint(checkpoint, path).difference < 1e-5
    return path


@pytest.fixture(scope="module")
def torch_file(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("torch") / "network.pt2"
    assert export_checkpoint(checkpoint, path).difference < 1e-5
    return path


def with_onnxruntime(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda clips, mask: np.asarray(
        session.run(None, {"clips": clips.numpy(), "mask": mask.numpy()})[0]
    )


def with_openvino(path: Path) -> Run:
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path, "CPU", options)
    return lambda clips, mask: np.array(
        compiled({"clips": clips.numpy(), "mask": mask.numpy()})["embeddings"]
    )


def with_torch(path: Path) -> Run:
    program = torch.export.load(path).module()
    return lambda clips, mask: np.asarray(program(clips, mask).detach().numpy())


RUNTIMES = [
    pytest.param("onnx_file", with_onnxruntime, marks=needs_onnx, id="onnxruntime"),
    pytest.param("onnx_file", with_openvino, marks=[needs_onnx, needs_openvino], id="openvino"),
    pytest.param("torch_file", with_torch, id="torch"),
]


def clips(batch: int, frames: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(batch, frames, 3, 64, 32, generator=generator)
    return pixels, torch.ones(batch, frames, dtype=torch.bool)


def network_says(checkpoint: Checkpoint, pixels: Tensor, mask: Tensor) -> NDArray[np.float32]:
    with torch.inference_mode():
        return np.asarray(checkpoint.network(pixels, mask).numpy())


@pytest.mark.parametrize(("file", "load"), RUNTIMES)
def test_it_embeds_as_the_network_for_any_number_of_tracklets_and_frames(
    checkpoint: Checkpoint, file: str, load: Callable[[Path], Run], request: pytest.FixtureRequest
) -> None:
    run = load(request.getfixturevalue(file))
    for batch, frames in ((1, 1), (1, 7), (5, 1), (3, 4)):
        pixels, mask = clips(batch, frames, seed=frames)

        got = run(pixels, mask)

        assert got.shape == (batch, 256)
        assert got.dtype == np.float32
        assert relative_difference(got, network_says(checkpoint, pixels, mask)) <= TOLERANCE


@pytest.mark.parametrize(("file", "load"), RUNTIMES)
def test_padding_changes_nothing_even_where_it_is_no_number(
    checkpoint: Checkpoint, file: str, load: Callable[[Path], Run], request: pytest.FixtureRequest
) -> None:
    run = load(request.getfixturevalue(file))
    pixels, mask = clips(2, 5)
    alone = network_says(checkpoint, pixels[1:, :2], mask[1:, :2])
    mask[1, 2:] = False
    pixels[1, 2:] = torch.nan

    got = run(pixels, mask)

    assert relative_difference(got[1:], alone) <= TOLERANCE


@needs_onnx
def test_an_onnx_file_says_which_network_it_is_and_how_its_input_is_made(
    checkpoint: Checkpoint, onnx_file: Path
) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    said = session.get_modelmeta().custom_metadata_map

    assert said["fingerprint"] == checkpoint.fingerprint
    assert json.loads(said["network"])["backbone"] == "conv5"
    assert json.loads(said["preprocessing"])["mean"] == list(SIZE.mean)
    assert [one.name for one in session.get_inputs()] == ["clips", "mask"]
    assert session.get_inputs()[0].shape == ["B", "T", 3, 64, 32]
    assert [one.name for one in session.get_outputs()] == ["embeddings"]


def test_a_torch_file_says_which_network_it_is(checkpoint: Checkpoint, torch_file: Path) -> None:
    about = {exporting.DESCRIPTION: ""}

    torch.export.load(torch_file, extra_files=about)

    said = json.loads(about[exporting.DESCRIPTION])
    assert said["fingerprint"] == checkpoint.fingerprint
    assert said["network"]["backbone"] == "conv5"
    assert said["preprocessing"]["std"] == list(SIZE.std)


@pytest.mark.parametrize("file", [pytest.param("onnx_file", marks=needs_onnx), "torch_file"])
def test_a_file_is_one_file_and_tells_nothing_of_the_machine_that_made_it(
    file: str, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(file)

    content = path.read_bytes()

    assert list(path.parent.iterdir()) == [path]
    assert b"network.py" not in content  # as in the lines of code that a trace was made of
    assert str(ROOT).encode() not in content
    assert b"stack_trace" not in content


@pytest.mark.parametrize("suffix", [pytest.param(".onnx", marks=needs_onnx), ".pt2"])
def test_a_network_with_a_neck_is_exported_with_it(suffix: str, tmp_path: Path) -> None:
    with_neck, path = make(neck=True), tmp_path / f"network{suffix}"

    assert export_checkpoint(with_neck, path).difference <= TOLERANCE

    pixels, mask = clips(2, 2)
    load = with_torch if suffix == ".pt2" else with_onnxruntime
    without = network_says(make(), pixels, mask)
    assert relative_difference(load(path)(pixels, mask), without) > 0.1


@pytest.mark.parametrize(
    ("suffix", "config"),
    [
        pytest.param(".onnx", EVERYTHING, marks=needs_onnx),
        (".pt2", EVERYTHING),
        (".pt2", {"head": 24}),
        (".pt2", {"temporal": "agreement", "unit": True}),
    ],
)
def test_a_head_a_pooling_and_unit_length_are_exported(
    suffix: str, config: dict[str, Any], tmp_path: Path
) -> None:
    """For any number of frames, one alone among them, and with padding that is no number."""
    network, path = make(**config), tmp_path / f"network{suffix}"

    assert export_checkpoint(network, path).difference <= TOLERANCE

    run = with_torch(path) if suffix == ".pt2" else with_onnxruntime(path)
    pixels, mask = clips(3, 6)
    mask[1, 1:], mask[2, 4:] = False, False
    pixels[~mask] = torch.nan
    expected = network_says(network, pixels, mask)
    assert relative_difference(run(pixels, mask), expected) <= TOLERANCE


@pytest.mark.parametrize("attention", ["mean", "l1", "none"])
def test_every_reading_of_the_attention_is_exported(attention: str, tmp_path: Path) -> None:
    reading = make(attention=attention, pool="mean")

    assert export_checkpoint(reading, tmp_path / "network.pt2").difference <= TOLERANCE


def spoil_weights(program: Any) -> Any:
    """Change one weight of an exported program by a thousandth of its size."""
    program.state_dict["network.backbone.conv5.weight"].data.mul_(1.001)
    return program


@pytest.mark.parametrize("suffix", [pytest.param(".onnx", marks=needs_onnx), ".pt2"])
def test_a_file_that_embeds_otherwise_is_refused_and_leaves_what_was_there(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, original = tmp_path / f"network{suffix}", torch.export.export
    path.write_text("an earlier file")

    def wrong(network: Any, *arguments: Any, **options: Any) -> Any:
        return spoil_weights(original(copy.deepcopy(network), *arguments, **options))

    monkeypatch.setattr(torch.export, "export", wrong)
    with pytest.raises(ExportError, match=r"within 0\.0001, got a difference of"):
        export_checkpoint(make(), path)

    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "an earlier file"


@needs_onnx
def test_a_file_that_takes_one_number_of_frames_only_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = torch.export.export

    def rigid(*arguments: Any, **options: Any) -> Any:
        return original(*arguments, **{**options, "dynamic_shapes": None})

    monkeypatch.setattr(torch.export, "export", rigid)
    with pytest.raises(ExportError, match="expected it to take 1 tracklets of 1 frames"):
        export_checkpoint(checkpoint, tmp_path / "network.onnx")

    assert not list(tmp_path.iterdir())


def test_a_converter_that_fails_leaves_nothing(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("an operator is unknown")

    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(ExportError, match="an operator is unknown"):
        export_checkpoint(checkpoint, tmp_path / "network.pt2")

    assert not list(tmp_path.iterdir())


def test_a_missing_extra_is_named(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "find_spec", lambda _: None)

    with pytest.raises(ExportError, match=r"pip install 'passerby\[export\]'"):
        export_checkpoint(checkpoint, tmp_path / "network.onnx")


def test_the_format_is_what_the_name_says_unless_told() -> None:
    assert choose_format(Path("a.onnx")) == "onnx"
    assert choose_format(Path("a.PT2")) == "torch"
    assert choose_format(Path("a.bin"), "onnx") == "onnx"
    with pytest.raises(ExportError, match=r"expected a file that ends in \.onnx or \.pt2"):
        choose_format(Path("a.pt"))
    with pytest.raises(ExportError, match="expected a format"):
        choose_format(Path("a.pt2"), "tflite")  # type: ignore[arg-type]


def test_a_folder_where_nothing_can_be_written_is_an_error(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(ExportError, match="could not write"):
        export_checkpoint(checkpoint, tmp_path / "file" / "network.pt2")
    with pytest.raises(ExportError, match="got the folder"):
        export_checkpoint(checkpoint, tmp_path, "torch")


def test_a_difference_is_relative_to_the_largest_value_and_infinite_for_what_is_none() -> None:
    ones = np.ones((2, 3), np.float32)

    assert relative_difference(4 * ones, 5 * ones) == pytest.approx(0.2)
    assert relative_difference(ones, ones[:1]) == np.inf
    assert relative_difference(ones * np.nan, ones) == np.inf
    assert relative_difference(0 * ones, 0 * ones) == 0


def test_the_command_says_what_was_checked(checkpoint: Checkpoint, tmp_path: Path) -> None:
    saved = save_checkpoint(checkpoint, tmp_path / "network.safetensors")
    output = tmp_path / "exported"

    result = CliRunner().invoke(
        app, ["export", str(tmp_path / "network.safetensors"), str(output), "--format", "torch"]
    )

    said = " ".join(result.output.split())
    assert result.exit_code == 0, result.output
    assert output.is_file()
    assert saved.fingerprint in said
    assert all(f"{batch}x{frames}" in said for batch, frames in CHECKED_SHAPES)
    assert "largest relative difference" in said


def run_example(code: str, folder: Path, tail: str = "") -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code + tail],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_onnx
def test_the_documented_onnx_runtime_example_gives_the_services_embeddings(
    checkpoint: Checkpoint, onnx_file: Path
) -> None:
    rng, folder = np.random.default_rng(0), onnx_file.parent
    for name, count in (("a", 3), ("b", 5)):
        (folder / "tracklets" / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (120, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "tracklets" / name / f"{number}.png")
    embedder = Embedder(checkpoint, device="cpu", precision="fp32")
    folders = sorted((folder / "tracklets").iterdir())
    served = embedder.embed([read_clip(sorted(one.iterdir()), SIZE) for one in folders])

    run_example(EXAMPLES[0], folder)

    got = np.load(folder / "embeddings.npy")
    assert relative_difference(got, np.stack([one.embedding for one in served])) <= TOLERANCE


@pytest.mark.parametrize(
    ("number", "file"),
    [
        pytest.param(1, "onnx_file", marks=[needs_onnx, needs_openvino], id="openvino"),
        pytest.param(2, "torch_file", id="torch"),
    ],
)
def test_the_other_documented_examples_run(
    number: int, file: str, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(file)

    said = run_example(EXAMPLES[number], path.parent, "\nprint(tuple(embeddings.shape))")

    assert said.strip() == "(2, 256)"


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [pytest.param(".onnx", marks=needs_onnx), ".pt2"])
def test_the_papers_network_is_exported_at_its_size(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"network{suffix}"

    exported = export_checkpoint(untrained_checkpoint(0), path)

    assert exported.difference <= TOLERANCE
    assert list(tmp_path.iterdir()) == [path]
    assert 93e6 < path.stat().st_size < 100e6
