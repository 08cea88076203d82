"""A checkpoint: weights, configuration, preprocessing and provenance in one safetensors file.

The fingerprint names the model everywhere: it is a hash of everything that shapes an embedding, so
two
checkpoints share it only if they embed alike. It is checked when a file is loaded.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.errors import CheckpointError
from model.files import reason, written_aside
from model.frames import Preprocessing
from model.network import NetworkConfig, TrackletNet
from model.quantised import QuantisedBackbone

FORMAT = "passerby-checkpoint-1"
IMAGENET = "IMAGENET1K_V1"
BUNDLED = "bundled"
"""The word for the checkpoint that comes with Passerby, wherever the path of one may stand."""
BUNDLED_FILE = Path(__file__).parent.parent / "weights" / "passerby.safetensors"
StoredPrecision = Literal["fp32", "fp16"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A network with everything that is needed to use it.

    Args:
        network: In eval mode, float32, on the CPU.
        preprocessing: What its frames must go through.
        provenance: Where the weights come from: free JSON for people, not part of the fingerprint.
        fingerprint: ``trsa-`` and 12 hex digits.
    """

    network: TrackletNet
    preprocessing: Preprocessing
    fingerprint: str
    provenance: Mapping[str, Any] = field(default_factory=dict)


def fingerprint(
    state: Mapping[str, Tensor], config: NetworkConfig, preprocessing: Preprocessing
) -> str:
    """Name a model after its content.

    Args:
        state: Weights by name. They count by value: float16 weights and the same values in float32
        agree.
        config: The network's configuration.
        preprocessing: What frames go through.

    Returns:
        ``trsa-`` and the first 12 hex digits of a SHA-256.
    """
    digest = hashlib.sha256(_canonical({"network": _named(config)}).encode())
    digest.update(_canonical({"preprocessing": asdict(preprocessing)}).encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu()
        if tensor.is_floating_point():
            tensor = tensor.float()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(np.ascontiguousarray(tensor.numpy()).ravel().data)
    return f"trsa-{digest.hexdigest()[:12]}"


def make_checkpoint(
    network: TrackletNet,
    preprocessing: Preprocessing | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Name a network that was built or trained in this process."""
    preprocessing = preprocessing or Preprocessing()
    network.eval()
    name = fingerprint(network.state_dict(), network.config, preprocessing)
    return Checkpoint(network, preprocessing, name, dict(provenance or {}))


def untrained_checkpoint(seed: int = 0, config: NetworkConfig | None = None) -> Checkpoint:
    """A network that nobody trained: seeded random weights, the same on every run.

    It finds people by rough colour and layout at best.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = TrackletNet(config)
    return make_checkpoint(network, provenance={"weights": "untrained", "seed": seed})


def find_checkpoint(given: str | Path) -> Path:
    """Resolve the word ``bundled``; any other path is returned as it is.

    Args:
        given: A path, or the word. A file of that very name is meant by ``./bundled``, as a string.

    Raises:
        CheckpointError: The word was given, and the file that came with Passerby is gone.
    """
    if str(given) != BUNDLED:
        return Path(given)
    if not BUNDLED_FILE.is_file():
        raise CheckpointError(
            f"expected the weights that come with Passerby, got nothing at {BUNDLED_FILE}; restore "
            "the file from the repository, or name a checkpoint of your own (`passerby serve` also "
            "takes `--weights untrained`)"
        )
    return BUNDLED_FILE


def backbone_checkpoint(source: str | Path, config: NetworkConfig | None = None) -> Checkpoint:
    """A network around an existing ResNet-50.

    Args:
        source: A torchvision-named state dict, ``.safetensors`` or ``.pth`` (read without executing
            anything in it); ``fc`` may be in it and is left out. Or the name ``IMAGENET1K_V1``,
            which
            downloads torchvision's weights.
        config: Which reading of the paper to follow.

    Raises:
        CheckpointError: The file is missing, damaged, or not a ResNet-50; or the download failed.
    """
    if str(source) == IMAGENET:
        state, provenance = _download_imagenet(), {"backbone": f"torchvision {IMAGENET}"}
    else:
        path = Path(source)
        state = _read_state(path)
        provenance = {"backbone": path.name, "backbone_sha256": _sha256(path)}
    state = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    network = TrackletNet(config)
    _check_state(state, network.backbone.state_dict(), what="a torchvision ResNet-50 state dict")
    network.backbone.load_state_dict(state)
    return make_checkpoint(network, provenance=provenance)


def save_checkpoint(
    checkpoint: Checkpoint, path: Path, *, precision: StoredPrecision = "fp32"
) -> Checkpoint:
    """Write a checkpoint; the file appears whole or not at all.

    Args:
        checkpoint: What to write.
        path: The file, replaced where it exists.
        precision: "fp16" halves the file and rounds the weights, which makes another model.

    Returns:
        The checkpoint as it will be loaded; its fingerprint is another one where rounding changed
        weights.

    Raises:
        CheckpointError: The file cannot be written.
    """
    state = {name: tensor.contiguous() for name, tensor in checkpoint.network.state_dict().items()}
    if precision == "fp16":
        state = {
            name: tensor.half() if tensor.is_floating_point() else tensor
            for name, tensor in state.items()
        }
    config, preprocessing = checkpoint.network.config, checkpoint.preprocessing
    name = fingerprint(state, config, preprocessing)
    header = {
        "format": FORMAT,
        "fingerprint": name,
        "network": _canonical(asdict(config)),
        "preprocessing": _canonical(asdict(preprocessing)),
        "provenance": _canonical(checkpoint.provenance),
    }
    try:
        with written_aside(path) as draft:
            save_file(state, draft, metadata=header)
            saved = load_checkpoint(draft)  # what cannot be read again does not take the name
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"could not write {path}: {reason(error)}") from error
    return saved


def is_checkpoint(path: Path) -> bool:
    """Whether a file says that it is a Passerby checkpoint; nothing of it is checked.

    Raises:
        CheckpointError: There is no file.
    """
    _require_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and check it against its fingerprint.

    Raises:
        CheckpointError: The file is missing, damaged, or not a Passerby checkpoint.
    """
    _require_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, str] = file.metadata() or {}
        if header.get("format") != FORMAT:
            raise CheckpointError(
                f"expected a checkpoint of format {FORMAT}, got {path} of format "
                f"{header.get('format', 'unknown')!r}; `passerby init` makes one from a ResNet-50"
            )
        config = NetworkConfig(**json.loads(header["network"]))
        preprocessing = _preprocessing(json.loads(header["preprocessing"]))
        provenance = json.loads(header["provenance"])
        # Copies: one counter that stayed a view would keep the whole file mapped, and a file that
        # is then overwritten in place ends the process.
        state = {
            name: tensor.to(torch.float32, copy=True)
            if tensor.is_floating_point()
            else tensor.clone()
            for name, tensor in load_file(path).items()
        }
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"expected a checkpoint, could not read {path}: {reason(error)}"
        ) from error
    with torch.device("meta"):  # no time spent on random weights that are replaced at once
        network = TrackletNet(config)
        if "backbone.scales" in state:  # of `model.quantisation`
            network.set_submodule("backbone", QuantisedBackbone(config.backbone))
    _check_state(state, network.state_dict(), what="the weights of a TrackletNet")
    name = fingerprint(state, config, preprocessing)
    if name != header.get("fingerprint"):
        raise CheckpointError(
            f"{path} is damaged: expected fingerprint {header.get('fingerprint')}, got {name}"
        )
    network.load_state_dict(state, assign=True)
    network.eval()
    return Checkpoint(network, preprocessing, name, provenance)


def without_people(provenance: Any) -> Any:
    """Provenance with a count in place of the names of those who were trained on.

    A checkpoint keeps the names, so that `passerby evaluate` can tell who is unseen. Whoever asks a
    service what it runs need not learn them.
    """
    if isinstance(provenance, Mapping):
        return {
            name: len(value)
            if name == "train_identities" and isinstance(value, list)
            else without_people(value)
            for name, value in provenance.items()
        }
    return (
        [without_people(one) for one in provenance] if isinstance(provenance, list) else provenance
    )


def trainings(provenance: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What provenance says of the data of every training of the weights, the last first.

    A training on a mix counts as one on each of its parts.
    """
    found: list[Mapping[str, Any]] = []
    said: Any = provenance
    while isinstance(said, Mapping):
        found += _trained_parts(said.get("data"))
        said = said.get("start")
    return found


def _trained_parts(data: object) -> list[Mapping[str, Any]]:
    """The data of one training; of a mix, those of each part."""
    if not isinstance(data, Mapping):
        return []
    parts = data.get("parts")
    if not isinstance(parts, list) or not parts:
        return [data]
    return [one for one in parts if isinstance(one, Mapping)]


def trained_identities(data: Mapping[str, Any]) -> set[str]:
    """Everybody in the data of one of the `trainings`, by the names that they have there."""
    identities = data.get("train_identities")
    return {str(one) for one in identities} if isinstance(identities, list) else set()


def _preprocessing(values: dict[str, Any]) -> Preprocessing:
    values["mean"], values["std"] = tuple(values["mean"]), tuple(values["std"])
    return Preprocessing(**values)


def _named(config: NetworkConfig) -> dict[str, Any]:
    """What of a configuration names a model.

    Fields that came later are left out at their defaults: a gallery keeps the vectors of the models
    that it knows under the names that it knows.
    """
    values, default = asdict(config), asdict(NetworkConfig())
    later = ("backbone", "neck", "head", "temporal", "unit")
    return {n: v for n, v in values.items() if n not in later or v != default[n]}


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"expected a weights file, got nothing at {path}")
    if not os.access(path, os.R_OK):
        raise CheckpointError(
            f"expected a weights file that may be read, got {path} without the right"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_state(path: Path) -> dict[str, Tensor]:
    _require_file(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, UnpicklingError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"expected a .safetensors file or a .pth file with nothing but tensors in it, "
            f"could not read {path}"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise CheckpointError(
            f"expected a state dict of tensors, got {type(state).__name__}: {path}"
        )
    return state


def _check_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    problems = [f"{name} is missing" for name in sorted(expected.keys() - state.keys())]
    problems += [f"{name} is unknown" for name in sorted(state.keys() - expected.keys())]
    for name in sorted(expected.keys() & state.keys()):
        if state[name].shape != expected[name].shape:
            problems.append(
                f"{name} is {tuple(state[name].shape)}, not {tuple(expected[name].shape)}"
            )
        elif state[name].is_floating_point() and not _is_finite(state[name]):
            problems.append(f"{name} holds NaN or infinity")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"expected {what}: {'; '.join(problems[:3])}{more}")


def _is_finite(tensor: Tensor) -> bool:
    # Ten times faster than isfinite() over every value; a NaN is both the least and the greatest.
    least, greatest = tensor.aminmax()
    return bool(least.isfinite() and greatest.isfinite())


def _download_imagenet() -> dict[str, Tensor]:
    from torchvision.models import ResNet50_Weights  # only this function needs it

    try:
        state: dict[str, Tensor] = ResNet50_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True)
    except OSError as error:
        raise CheckpointError(
            f"could not download {IMAGENET}; fetch the file elsewhere and give its path"
        ) from error
    return state
