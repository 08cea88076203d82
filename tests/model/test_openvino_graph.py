"""Networks in OpenVINO's format: what PyTorch makes of them is what OpenVINO makes."""

import importlib.util
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from model.errors import TeacherError
from model.openvino_graph import _KINDS, OpenVinoGraph
from model.teacher import load_teacher

SHARED = Path(os.environ.get("SHARED", Path(__file__).parents[3] / "shared"))
REAL = SHARED / "weights" / "person-reidentification-retail-0277.xml"

needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="needs the extra openvino"
)
needs_teacher = pytest.mark.skipif(
    not REAL.exists(), reason="needs the teacher of a shared folder beside the checkout"
)


def write_ir(path: Path, *, half: bool = False) -> Path:
    """A network of every kind of layer, for one crop at a time, which makes six numbers."""
    import openvino
    from openvino import opset8, opset13

    rng = np.random.default_rng(0)

    def drawn(*shape: int) -> NDArray[np.float32]:
        return np.asarray(rng.normal(scale=0.5, size=shape), np.float32)

    ops = opset13
    crop = ops.parameter([1, 3, 40, 32], np.float32)
    value = ops.gather(crop, np.array([2, 1, 0]), np.int64(1))
    value = ops.subtract(ops.divide(value, np.float32(100)), drawn(1, 3, 1, 1))
    value = ops.convolution(value, drawn(8, 3, 5, 3), [2, 1], [2, 1], [1, 2], [1, 1])
    value = ops.mvn(value, np.array([2, 3]), True, 1e-3, "inside_sqrt")
    value = ops.prelu(value, drawn(8))
    value = opset8.max_pool(value, [2, 2], [1, 1], [1, 1], [1, 1], [3, 3], "floor").output(0)
    value = ops.group_convolution(value, drawn(4, 3, 2, 3, 3), [1, 1], [2, 2], [2, 2], [2, 2])
    value = ops.avg_pool(ops.clamp(value, -3, 3), [2, 2], [0, 0], [0, 0], [2, 2], True, "floor")
    gate = ops.sigmoid(ops.reduce_mean(value, np.array([2, 3]), True))
    value = ops.relu(ops.add(ops.multiply(value, gate), drawn(1, 12, 1, 1)))
    value = ops.reduce_mean(ops.maximum(value, ops.minimum(value, gate)), np.array([2, 3]), False)
    # As exporters write it: a shape that is made of another one.
    channels = ops.gather(ops.shape_of(value), np.array([1]), np.int64(0))
    value = ops.reshape(value, ops.concat([np.array([1, 1]), channels], 0), False)
    value = ops.reshape(value, np.array([0, -1]), True)
    value = ops.tanh(ops.matmul(value, drawn(6, 12), False, True))
    openvino.save_model(openvino.Model([value], [crop]), path, compress_to_fp16=half)
    return path


def crops(count: int, height: int = 40, width: int = 32) -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, 3, height, width)).astype(np.float32)


@needs_openvino
@pytest.mark.parametrize("half", [False, True])
def test_a_network_gives_what_openvino_gives(tmp_path: Path, half: bool) -> None:
    """A batch, although the file says one crop; also where its weights are halves."""
    import openvino

    path = write_ir(tmp_path / "network.xml", half=half)
    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    expected = np.concatenate([compiled(one[None])[0] for one in crops(3)])

    with torch.inference_mode():
        made = OpenVinoGraph(path)(torch.from_numpy(crops(3))).numpy()

    assert made.shape == (3, 6)
    assert made == pytest.approx(expected, abs=2e-5)
    assert np.ptp(expected, axis=0).max() > 1e-2  # crops are told apart


@needs_openvino
def test_what_a_layer_made_is_not_kept_longer_than_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher of a thousand layers would take a card's whole memory otherwise."""
    graph = OpenVinoGraph(write_ir(tmp_path / "network.xml"))
    made: list[weakref.ref[torch.Tensor]] = []
    first, last = _KINDS["Convolution"], _KINDS["Tanh"]
    alive: list[bool] = []

    def remember(*inputs: Any) -> torch.Tensor:
        output = first(*inputs)
        made.append(weakref.ref(output))
        return output

    def look(*inputs: Any) -> torch.Tensor:
        alive.extend(one() is not None for one in made)
        return last(*inputs)

    monkeypatch.setitem(_KINDS, "Convolution", remember)
    monkeypatch.setitem(_KINDS, "Tanh", look)
    with torch.inference_mode():
        graph(torch.from_numpy(crops(2)))

    assert alive == [False]


@needs_openvino
def test_a_network_computes_in_the_type_of_its_crops(tmp_path: Path) -> None:
    graph = OpenVinoGraph(write_ir(tmp_path / "network.xml"))

    with torch.inference_mode():
        whole = graph(torch.from_numpy(crops(4)))
        rough = graph.to(torch.bfloat16)(torch.from_numpy(crops(4)).bfloat16())

    assert rough.dtype == torch.bfloat16
    assert 0 < float((rough.float() - whole).norm() / whole.norm()) < 5e-2


@needs_openvino
@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("<net", "<net <", "could not read"),
        ('type="Tanh"', 'type="Erf"', r"expected layers among Add, .* got Erf: "),
        ('type="Result"', 'type="Sink"', "one input and one output, got 1 and 0"),
        ('element_type="f32"', 'element_type="f8"', "expected constants of"),
        ('auto_pad="explicit"', 'auto_pad="same_upper"', "expected explicit padding"),
        ('rounding_type="floor"', 'rounding_type="ceil"', "pooling that rounds down"),
    ],
)
def test_a_file_that_says_something_else_is_refused(
    before: str, after: str, message: str, tmp_path: Path
) -> None:
    path = write_ir(tmp_path / "network.xml")
    text = path.read_text(encoding="utf-8")
    assert before in text
    path.write_text(text.replace(before, after), encoding="utf-8")

    with pytest.raises(TeacherError, match=message):
        OpenVinoGraph(path)(torch.from_numpy(crops(1)))


@needs_openvino
def test_a_layer_whose_second_output_counts_is_refused(tmp_path: Path) -> None:
    import openvino
    from openvino import opset13 as ops

    crop = ops.parameter([1, 3, 40, 32], np.float32)
    parts = ops.split(crop, np.int64(3), 2)
    model = openvino.Model([ops.subtract(parts.output(0), parts.output(1))], [crop])
    openvino.save_model(model, tmp_path / "network.xml")

    with pytest.raises(TeacherError, match="expected layers with one output that is used"):
        OpenVinoGraph(tmp_path / "network.xml")


@needs_openvino
def test_weights_that_are_missing_or_cut_short_are_refused(tmp_path: Path) -> None:
    path = write_ir(tmp_path / "network.xml")
    weights = path.with_suffix(".bin")
    weights.write_bytes(weights.read_bytes()[:100])

    with pytest.raises(TeacherError, match=r"expected at least \d+ bytes of weights, got 100"):
        OpenVinoGraph(path)
    weights.unlink()
    with pytest.raises(TeacherError, match="could not read"):
        OpenVinoGraph(path)


@pytest.mark.dataset
@pytest.mark.slow
@needs_openvino
@needs_teacher
def test_the_teacher_of_the_bundled_weights_is_the_same_in_pytorch() -> None:
    expected = load_teacher(REAL)
    teacher = load_teacher(REAL, runtime="torch")
    pixels = crops(3, 256, 128).astype(np.uint8).transpose(0, 2, 3, 1)

    made, wanted = teacher.embed(pixels), expected.embed(pixels)

    assert np.linalg.norm(made - wanted) / np.linalg.norm(wanted) < 1e-4
