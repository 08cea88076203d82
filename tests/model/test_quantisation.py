"""8-bit checkpoints: what rounding keeps, and that nobody takes one for what it was made of."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional
from typer.testing import CliRunner

from model.checkpoint import (
    Checkpoint,
    load_checkpoint,
    make_checkpoint,
    save_checkpoint,
    untrained_checkpoint,
)
from model.cli import app
from model.datasets.synthetic import SyntheticSet, write_set
from model.embedder import Embedder, fold_batch_norm
from model.errors import CheckpointError, DeviceError, ExportError
from model.export import export_checkpoint
from model.frames import Clip, Preprocessing
from model.learner import _adopt
from model.network import NetworkConfig, build_backbone
from model.quantisation import (
    FRAMES,
    Agreement,
    Sample,
    choose_calibration,
    compare_models,
    drawn_samples,
    quantise_backbone,
    quantise_checkpoint,
    quantise_file,
)
from model.quantised import WEIGHT_LEVELS, QuantisedBackbone, plan_steps

SIZE = Preprocessing(height=64, width=32)
FEW = SyntheticSet(identities=4, cameras=2, frames_min=4, frames_max=6, height=64, width=32, seed=3)
needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="needs openvino")


@pytest.fixture(scope="module")
def original() -> Checkpoint:
    """A small network with a head whose normalisations are not all alike."""
    config = NetworkConfig(backbone="conv5", head=24, temporal="agreement", unit=True)
    network = untrained_checkpoint(0, config).network
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.copy_(0.5 + torch.rand(module.weight.shape, generator=generator))
            module.bias.data.copy_(0.2 * torch.randn(module.bias.shape, generator=generator))
    return make_checkpoint(network, SIZE, {"data": {"train_identities": ["a", "b"]}})


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return drawn_samples(SIZE, FEW)


@pytest.fixture(scope="module")
def quantised(original: Checkpoint, samples: Sequence[Sample]) -> Checkpoint:
    return quantise_checkpoint(original, choose_calibration(samples), {"data": "a test"})


def backbone_of(checkpoint: Checkpoint) -> QuantisedBackbone:
    backbone: Any = checkpoint.network.backbone
    assert isinstance(backbone, QuantisedBackbone)
    return backbone


def embed(checkpoint: Checkpoint, clip: Clip, **options: Any) -> NDArray[np.float32]:
    embedder = Embedder(checkpoint, device="cpu", **options)
    return embedder.embed([clip])[0].embedding


def relative(made: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(made - wanted) / np.linalg.norm(wanted))


def test_a_rounded_network_embeds_within_a_few_percent(
    original: Checkpoint, quantised: Checkpoint
) -> None:
    """Also people whom it was not calibrated on; and it is not the same network by mistake."""
    for sample in drawn_samples(SIZE, replace(FEW, seed=4)):
        exact = embed(original, sample.clip, precision="fp32", runtime="torch")
        error = relative(embed(quantised, sample.clip, runtime="torch"), exact)

        assert 1e-4 < error < 0.05


@needs_openvino
def test_openvino_and_pytorch_agree_on_a_rounded_network(
    quantised: Checkpoint, samples: Sequence[Sample]
) -> None:
    """They share a fingerprint, so their vectors may meet in one gallery."""
    for sample in samples:
        whole = embed(quantised, sample.clip, runtime="openvino")
        stood_for = embed(quantised, sample.clip, runtime="torch")

        assert relative(whole, stood_for) < 2e-2


@needs_openvino
def test_openvino_computes_its_convolutions_on_whole_numbers(quantised: Checkpoint) -> None:
    """A graph that it does not recognise would run, in float32, and gain nothing."""
    import openvino

    from model.openvino_runtime import build_graph

    backbone = backbone_of(quantised)
    graph = build_graph(quantised.network, SIZE, backbone.add_to_graph)
    compiled = openvino.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    kinds = [
        node.get_rt_info()["runtimePrecision"].astype(str)
        for node in compiled.get_runtime_model().get_ops()
        if node.get_rt_info()["layerType"].astype(str) == "Convolution"
    ]
    assert len(kinds) == 5
    assert set(kinds) <= {"u8", "i8"}


def test_a_convolution_is_that_of_its_whole_numbers(quantised: Checkpoint) -> None:
    """By integer arithmetic, and 8 bits hold every number."""
    backbone = backbone_of(quantised)
    convolution = backbone.convolution(backbone.steps[3])
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 256, (2, 32, 9, 7), generator=generator)

    made = convolution(levels.float() * 0.01)

    sums = functional.conv2d(levels.double(), convolution.weight.double(), stride=2, padding=1)
    expected = sums * 0.01 * convolution.scale.view(-1, 1, 1)
    expected += convolution.bias.view(-1, 1, 1)
    assert convolution.weight.dtype == torch.int8
    assert convolution.weight.abs().max() == WEIGHT_LEVELS
    assert torch.allclose(made.double(), expected, atol=1e-4)


def test_no_sum_of_two_products_overflows_16_bits() -> None:
    """Where a processor has no instruction for 8 bits its sums are clipped there."""
    assert np.iinfo(np.int16).max >= 2 * 255 * WEIGHT_LEVELS


def test_zero_is_kept_exactly(quantised: Checkpoint) -> None:
    """Padding is zeros; a mean that moved would move every border."""
    backbone = backbone_of(quantised)

    for step in backbone.steps:
        assert torch.equal(backbone.round(step, torch.zeros(3)), torch.zeros(3))


def test_zero_is_kept_where_calibration_never_saw_it(original: Checkpoint) -> None:
    """Bright people alone: the frames' own padding is zeros all the same."""
    bright = torch.linspace(1, 2, 2 * 3 * 64 * 32).view(2, 3, 64, 32)

    made = quantise_backbone(fold_batch_norm(original.network.backbone), "conv5", bright)

    assert torch.equal(made.round(made.steps[0], torch.zeros(3)), torch.zeros(3))
    assert (made.round(made.steps[0], bright) - bright).abs().max() <= 2 / 255


def test_nothing_that_calibration_saw_is_clipped(original: Checkpoint) -> None:
    frames = torch.linspace(-2, 3, 2 * 3 * 64 * 32).view(2, 3, 64, 32)

    made = quantise_backbone(fold_batch_norm(original.network.backbone), "conv5", frames)

    one_level = 5 / 255
    assert (made.round(made.steps[0], frames) - frames).abs().max() <= one_level
    assert (made.round(made.steps[0], frames + 1) - (frames + 1)).abs().max() > 0.9  # others are


def test_a_bias_makes_good_the_mean_of_what_rounding_changed(original: Checkpoint) -> None:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(8, 3, 64, 32, generator=generator)
    folded = fold_batch_norm(original.network.backbone)
    made = quantise_backbone(folded, "conv5", frames)
    uncorrected = quantise_backbone(folded, "conv5", frames)
    for step in made.steps:
        if step.kind == "convolution":
            layer: Any = folded.get_submodule(step.name)
            uncorrected.convolution(step).bias = layer.bias.detach()

    with torch.inference_mode():
        exact = folded(frames).mean(dim=(0, 2, 3))
        off, off_uncorrected = (
            (one(frames).mean(dim=(0, 2, 3)) - exact).abs().mean() for one in (made, uncorrected)
        )

    assert off < 0.5 * off_uncorrected


def test_the_steps_of_a_resnet_are_those_of_its_file() -> None:
    """53 convolutions, 16 shortcuts; rounded is what a convolution or an addition takes."""
    with torch.device("meta"):
        steps = plan_steps(build_backbone("resnet50"))

    kinds = [step.kind for step in steps]
    assert kinds.count("convolution") == 53
    assert kinds.count("add") == 16
    assert kinds.count("relu") == 49
    assert kinds.count("max_pool") == 1
    rounded = [step for step in steps if step.rounded is not None]
    # The image, each ReLU but the last, the last convolution of a block, and 4 shortcuts' own.
    assert len(rounded) == 1 + 48 + 16 + 4
    assert steps[-1].rounded is None


@needs_openvino
@pytest.mark.slow
def test_a_resnet_is_rounded_likewise() -> None:
    network = untrained_checkpoint(0, NetworkConfig(head=16)).network
    for name, module in network.named_modules():
        if name.endswith("bn3") and isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.fill_(0.3)  # or random weights overflow
    checkpoint = make_checkpoint(network, SIZE)
    few = drawn_samples(SIZE, FEW)

    made = quantise_checkpoint(checkpoint, choose_calibration(few), {})

    exact = embed(checkpoint, few[0].clip, precision="fp32", runtime="torch")
    assert 1e-4 < relative(embed(made, few[0].clip, runtime="openvino"), exact) < 0.1
    assert 1e-4 < relative(embed(made, few[0].clip, runtime="torch"), exact) < 0.1


def test_a_rounded_checkpoint_is_another_model_with_the_same_history(
    original: Checkpoint, quantised: Checkpoint
) -> None:
    assert quantised.fingerprint != original.fingerprint
    assert quantised.network.config == original.network.config
    assert quantised.provenance["data"] == original.provenance["data"]
    assert quantised.provenance["quantised"]["of"] == original.fingerprint
    assert not isinstance(original.network.backbone, QuantisedBackbone)  # it stays as it was


def test_rounding_again_gives_the_same_model(
    original: Checkpoint, quantised: Checkpoint, samples: Sequence[Sample]
) -> None:
    again = quantise_checkpoint(original, choose_calibration(samples), {"data": "other words"})

    assert again.fingerprint == quantised.fingerprint


def test_other_frames_make_another_model(
    original: Checkpoint, quantised: Checkpoint, samples: Sequence[Sample]
) -> None:
    other = quantise_checkpoint(original, samples[0].clip, {})

    assert other.fingerprint != quantised.fingerprint


def test_a_rounded_checkpoint_is_not_exported(quantised: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="expected a checkpoint in float to export"):
        export_checkpoint(quantised, tmp_path / "network.pt2")


def test_a_rounded_checkpoint_is_no_start_of_a_training(
    quantised: Checkpoint, tmp_path: Path
) -> None:
    config = quantised.network.config

    with pytest.raises(CheckpointError, match=r"weights in float, got .* in 8 bits"):
        _adopt(quantised.network, config, tmp_path / "small.safetensors")


def test_it_says_that_it_computes_in_8_bits(quantised: Checkpoint) -> None:
    assert Embedder(quantised, device="cpu").describe()["precision"] == "int8"


def test_a_rounded_checkpoint_is_not_rounded_again(quantised: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match="expected a checkpoint in float, got trsa-"):
        quantise_checkpoint(quantised, np.zeros((1, 64, 32, 3), np.uint8), {})


def test_a_saved_file_comes_back_and_is_smaller(
    original: Checkpoint, quantised: Checkpoint, samples: Sequence[Sample], tmp_path: Path
) -> None:
    whole, small = tmp_path / "whole.safetensors", tmp_path / "small.safetensors"
    save_checkpoint(original, whole)

    saved = save_checkpoint(quantised, small)
    loaded = load_checkpoint(small)

    assert small.stat().st_size < 0.4 * whole.stat().st_size
    assert saved.fingerprint == loaded.fingerprint == quantised.fingerprint
    clip = samples[0].clip
    for checkpoint in (saved, loaded):
        made = embed(checkpoint, clip, runtime="torch")
        assert np.array_equal(made, embed(quantised, clip, runtime="torch"))


def test_a_damaged_file_is_refused(quantised: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_checkpoint(quantised, path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)

    with pytest.raises(CheckpointError, match="expected"):
        load_checkpoint(path)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_what_is_around_8_bits_is_float32(quantised: Checkpoint, precision: Any) -> None:
    with pytest.raises(DeviceError, match="expected precision auto or fp32"):
        Embedder(quantised, device="cpu", precision=precision)


def test_calibration_takes_as_many_frames_as_memory_is_meant_for() -> None:
    clip = np.zeros((FRAMES, 64, 32, 3), np.uint8)
    many = [Sample(str(number), "a", clip + np.uint8(number)) for number in range(3)]

    chosen = choose_calibration(many)

    assert chosen.shape == (FRAMES, 64, 32, 3)
    assert set(np.unique(chosen)) == {0, 1, 2}
    assert np.array_equal(chosen, choose_calibration(many))
    assert not np.array_equal(chosen, choose_calibration(many, seed=1))


def test_a_model_compared_with_itself_is_the_same(
    original: Checkpoint, samples: Sequence[Sample]
) -> None:
    agreement = compare_models(original, original, samples)

    assert agreement.error == agreement.largest_error == 0
    assert agreement.queries == 8
    assert agreement.rank_1 == agreement.rank_1_before
    assert agreement.holds


def test_people_of_one_camera_are_compared_without_ranks(
    original: Checkpoint, quantised: Checkpoint, samples: Sequence[Sample]
) -> None:
    agreement = compare_models(original, quantised, [one for one in samples if one.camera == "1"])

    assert 0 < agreement.error < 0.05
    assert agreement.queries == 0
    assert agreement.rank_1 is None


@pytest.mark.parametrize(
    ("agreement", "holds"),
    [
        (Agreement(0.099, 0.5), True),
        (Agreement(0.101, 0.2), False),
        (Agreement(0.02, 0.1, 9, 0.9, 1.0, 0.95, 0.959), True),
        (Agreement(0.02, 0.1, 9, 0.9, 1.0, 0.95, 0.961), False),
        (Agreement(0.02, 0.1, 9, 1.0, 0.9, 0.99, 0.95), True),
    ],
)
def test_a_model_holds_that_is_near_and_finds_whom_the_other_finds(
    agreement: Agreement, holds: bool
) -> None:
    assert agreement.holds is holds


@pytest.fixture
def few_drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Sample]]:
    """The command, without drawing 48 tracklets each time."""

    def draw(preprocessing: Preprocessing) -> list[Sample]:
        return drawn_samples(preprocessing, FEW)

    monkeypatch.setattr("model.quantisation.drawn_samples", draw)
    return draw


@pytest.mark.usefixtures("few_drawn")
def test_the_command_writes_what_it_says(original: Checkpoint, tmp_path: Path) -> None:
    source, output = tmp_path / "net.safetensors", tmp_path / "small.safetensors"
    save_checkpoint(original, source)

    result = CliRunner().invoke(app, ["quantise", str(source), "--output", str(output)])

    assert result.exit_code == 0, result.output
    loaded = load_checkpoint(output)
    assert f"model {loaded.fingerprint} of {original.fingerprint}" in result.output
    assert "rank-1" in result.output
    told = loaded.provenance["quantised"]
    assert told["calibrated_on"]["data"] == "drawn people"
    assert 0 < told["relative_error"] < 0.05


def test_the_command_calibrates_on_a_folder_and_does_not_name_it(
    original: Checkpoint, tmp_path: Path
) -> None:
    write_set(FEW, tmp_path / "secret", masks=False, jobs=1)
    output = tmp_path / "small.safetensors"

    saved, _ = quantise_file(original, output, data=tmp_path / "secret")

    told = saved.provenance["quantised"]["calibrated_on"]
    assert told["layout"] == "folder"
    assert told["tracklets"] == 8
    assert "secret" not in str(saved.provenance)


@pytest.mark.usefixtures("few_drawn")
def test_a_model_that_does_not_hold_is_not_written(
    original: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "small.safetensors"
    output.write_bytes(b"what was there")
    monkeypatch.setattr("model.quantisation.LARGEST_ERROR", 1e-6)

    with pytest.raises(ExportError, match=r"not written: expected embeddings within .*, got"):
        quantise_file(original, output)

    assert output.read_bytes() == b"what was there"
