"""What a training run leaves on disk: its recipe, its circumstances, its log and its state."""

import json
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.datasets.tracklets import Split
from model.errors import TrainingError
from model.files import ASIDE, reason, written_aside
from model.loading import identity_labels
from model.recipe import Recipe, format_recipe, load_recipe

RECIPE, FACTS, LOG, STATE, PRODUCT = (
    "recipe.toml",
    "run.json",
    "log.jsonl",
    "state.safetensors",
    "model.safetensors",
)
_FORMAT = "passerby-training-state-1"


@dataclass(frozen=True, slots=True)
class Moment:
    """Where in a run its state was saved.

    Args:
        epoch: The epoch that comes next or goes on, from 0.
        batch: The batch in it that comes next, from 0.
        step: Optimiser steps that are done.
        elapsed_s: Time that they took, over all interruptions.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    elapsed_s: float = 0.0


class RunFolder:
    """A folder of one training run. Every file in it appears whole or not at all.

    Args:
        path: The folder; made when something is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.product = path / PRODUCT

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end."""
        return self.product.is_file()

    @property
    def has_state(self) -> bool:
        """Whether there is a state to go on from, or what came of it."""
        return self.is_finished or (self.path / STATE).is_file()

    def begin(self, recipe: Recipe, facts: Mapping[str, Any]) -> bool:
        """Begin a run here, or take up the one that is here.

        Args:
            recipe: What the run does.
            facts: What else decides its weights: data, split, seed, ...; plain values.

        Returns:
            Whether a run was here already.

        Raises:
            TrainingError: Another run is here, or the folder cannot be written.
        """
        if self._look():
            self._compare(recipe, facts)
            return True
        self.write_json(FACTS, {**facts, "versions": versions()})
        self._write(RECIPE, format_recipe(recipe))  # last: its presence says that a run is here
        return False

    def _look(self) -> bool:
        """Whether a run is here; what a killed one left half written is removed."""
        try:
            if not self.path.exists():
                return False
            names = {entry.name for entry in self.path.iterdir()}
        except OSError as error:
            raise TrainingError(
                f"expected a folder for the run, got {self.path}: {reason(error)}"
            ) from error
        for name in sorted(names):
            if name.startswith(ASIDE):
                shutil.rmtree(self.path / name, ignore_errors=True)
        if RECIPE in names:
            return True
        if any(name != FACTS and not name.startswith(ASIDE) for name in names):
            raise TrainingError(
                f"expected a new folder or one of a run, got {self.path} with something else in it"
            )
        return False

    def _compare(self, recipe: Recipe, facts: Mapping[str, Any]) -> None:
        kept = load_recipe(self.path / RECIPE)
        if kept != recipe:
            raise TrainingError(
                f"expected the recipe of the run in {self.path}, got another one "
                f"({_difference(kept, recipe)}); give another --output to begin a new run"
            )
        known = self.read_facts()
        for name, value in facts.items():
            where, old, new = _first_difference(name, known.get(name), value)
            if old != new:
                raise TrainingError(
                    f"expected to go on with the run in {self.path}, but its {where} is "
                    f"{_short(old)} and now it would be {_short(new)}"
                )

    def read_facts(self) -> dict[str, Any]:
        """What was written when the run began.

        Raises:
            TrainingError: It cannot be read.
        """
        path = self.path / FACTS
        try:
            facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TrainingError(f"expected a run's facts in {path}, could not read it") from error
        return facts

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Write a JSON file.

        Raises:
            TrainingError: It cannot be written.
        """
        self._write(name, json.dumps(values, indent=2, ensure_ascii=False) + "\n")

    def _write(self, name: str, text: str) -> None:
        with self._aside(name) as draft:
            draft.write_text(text, encoding="utf-8")

    @contextmanager
    def _aside(self, name: str) -> Iterator[Path]:
        """Yield a path to write to, which then takes the name; what was there survives failure."""
        try:
            with written_aside(self.path / name) as draft:
                yield draft
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"could not write {self.path / name}: {reason(error)}; anything saved before is "
                "still there, and the same command goes on from it"
            ) from error

    def save_state(
        self, tensors: Mapping[str, Tensor], moment: Moment, extra: Mapping[str, float]
    ) -> None:
        """Save all that is needed to go on.

        Raises:
            TrainingError: It cannot be written; the state that was saved before survives.
        """
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        header = {
            "format": _FORMAT,
            "moment": json.dumps([moment.epoch, moment.batch, moment.step, moment.elapsed_s]),
            "extra": json.dumps(dict(extra)),
        }
        with self._aside(STATE) as draft:
            save_file(kept, draft, metadata=header)

    def load_state(self) -> tuple[dict[str, Tensor], Moment, dict[str, float]] | None:
        """What was saved last; None where nothing was.

        Raises:
            TrainingError: It is damaged.
        """
        path = self.path / STATE
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                header: dict[str, str] = file.metadata() or {}
            if header.get("format") != _FORMAT:
                raise ValueError(f"format {header.get('format')!r}")
            moment = Moment(*json.loads(header["moment"]))
            return load_file(path), moment, json.loads(header["extra"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise TrainingError(f"expected a training state of {_FORMAT}: {path}") from error

    def drop_state(self) -> None:
        """Remove the state, once the run is finished: it is three times as large as the network."""
        (self.path / STATE).unlink(missing_ok=True)

    def rewind_log(self, step: int) -> None:
        """Take back what was logged after a step, because it is about to happen again."""
        path = self.path / LOG
        if not path.exists():
            return
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _step_of(line) <= step]
        self._write(LOG, "".join(line + "\n" for line in kept))

    def read_log(self) -> list[dict[str, Any]]:
        """What was logged so far, oldest line first; nothing where there is no log."""
        try:
            lines = (self.path / LOG).read_text(encoding="utf-8").splitlines()
        except OSError:
            return []
        return [json.loads(line) for line in lines]

    def log(self, values: Mapping[str, Any]) -> None:
        """Append one line to the log.

        Raises:
            TrainingError: It cannot be written.
        """
        try:
            with (self.path / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise TrainingError(
                f"could not write {self.path / LOG}: {error.strerror}; the same command goes on "
                "from what was saved last"
            ) from error


def describe_split(
    split: Split,
    *,
    layout: str,
    fingerprint: str,
    parts: Mapping[str, Mapping[str, str]] | None = None,
) -> dict[str, Any]:
    """What a run and its checkpoint say about their data.

    Args:
        split: What is trained on.
        layout: Of the data set.
        fingerprint: Of the data set.
        parts: Layout and fingerprint of each part of a mix, by its name. Whom it trains is then
            said of each part by the names that they have there, so that the part, evaluated alone,
            is known again.
    """
    identities = list(identity_labels(split.train))
    described = {
        "layout": layout,
        "fingerprint": fingerprint,
        "split": split.name,
        "source": split.source,
        "train_identities": identities,
        "train_tracklets": len(split.train),
        "query_tracklets": len(split.query),
        "gallery_tracklets": len(split.gallery),
    }
    if parts:
        described["parts"] = [
            {
                "name": name,
                **known,
                "train_identities": [
                    one.removeprefix(f"{name}/") for one in identities if one.startswith(f"{name}/")
                ],
            }
            for name, known in parts.items()
        ]
    return described


def versions() -> dict[str, str | int]:
    """What a run was made with."""
    found: dict[str, str | int] = {"python": platform.python_version()}
    found["torch"] = str(torch.__version__)
    found |= {"numpy": np.__version__, "machine": platform.machine()}
    found["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    for name in ("passerby", "torchvision", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def _step_of(line: str) -> int:
    try:
        step: int = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return 2**62  # a line that was cut by a crash
    return step


def _difference(kept: Recipe, given: Recipe) -> str:
    lines = set(format_recipe(given).splitlines()) - set(format_recipe(kept).splitlines())
    return ", ".join(sorted(lines)[:3]) or "fewer settings"


def _first_difference(name: str, old: object, new: object) -> tuple[str, object, object]:
    """Where two values differ, as deep in them as it goes."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(key for key in old if key not in new)]:
            if old.get(key) != new.get(key):
                return _first_difference(f"{name}.{key}", old.get(key), new.get(key))
    return name, old, new


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
