"""The training loop: one recipe, one split, one folder; interrupted anywhere, it goes on exactly.

Every random draw depends on the seed and on the place in the run, so the state to go on from is the
weights, the optimiser's averages and a position. On one CPU with one number of threads, a run that
was interrupted ends with the very weights of one that was not.
"""

import contextlib
import importlib.util
import math
import os
import signal
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from model.checkpoint import Checkpoint, make_checkpoint, save_checkpoint
from model.datasets.tracklets import Split, Tracklet
from model.embedder import DTYPES, Embedder, choose_device, choose_precision
from model.errors import CheckpointError, DatasetError, InvalidFramesError, TrainingError
from model.health import HealthWatch
from model.learner import Learned, Learner, start_network
from model.live_teacher import LiveTeacher
from model.loading import Batch, ClipLoader, FrameStore
from model.losses import (
    LossTerms,
    coverage_cv2,
    effective_positions,
    identity_accuracy,
    regulariser_excess,
    total_loss,
    wrong_logit_mean,
)
from model.network import TrackletNet, build_backbone, unit_length
from model.ranks import Ranks
from model.recipe import BatchConfig, Recipe, recipe_values, without_places
from model.runs import Moment, RunFolder
from model.samplers import ClipSampler, PKSampler, Sampler
from model.teacher_cache import VIEWS_FORMAT, TeacherEmbeddings
from model.within_class import WithinClassConfig, normalise_head, twice_seen

LOG_EVERY_STEPS = 10
ADVICE = (
    "what was saved before survives, but the same recipe comes to the same: begin another run, in "
    "another --output, with a lower rate, with clip_norm or with fp32"
)
SAVE_EVERY_S = 120.0


@dataclass(frozen=True, slots=True)
class Job:
    """What is trained on what.

    Args:
        recipe: How.
        split: On whom.
        data: What the checkpoint says about the data, see `model.runs.describe_split`.
        seed: Decides every draw.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        teacher: The teacher's embeddings of the training frames, or the teacher itself where it is
            live, where the recipe has one.
        measure: Evaluates a checkpoint on the split's test identities: names to numbers.
        save_every_s: Seconds between saved states.
        workers: Threads that decode; by default as many as cores.
    """

    recipe: Recipe
    split: Split
    data: Mapping[str, Any]
    seed: int = 0
    device: str = "auto"
    teacher: TeacherEmbeddings | LiveTeacher | None = None
    measure: Callable[[Checkpoint], Mapping[str, float]] | None = None
    save_every_s: float = SAVE_EVERY_S
    workers: int | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is.

    Args:
        step: Optimiser steps that are done.
        steps: Optimiser steps in all.
        epoch: From 0.
        loss: Of the last batch.
        frames_per_s: Since this process began, with everything that it also does.
        left_s: Seconds left at that pace.
    """

    step: int
    steps: int
    epoch: int
    loss: float
    frames_per_s: float
    left_s: float


class Listener:
    """Hears of a run; this one ignores it."""

    def progress(self, progress: Progress) -> None:
        """After each step."""

    def loaded(self, done: int, total: int) -> None:
        """While frames are decoded before the first step."""

    def normalised(self, done: int, total: int) -> None:
        """While frames are embedded for `model.within_class`, after the last step."""

    def said(self, text: str) -> None:
        """Something worth a line."""

    def warned(self, text: str) -> None:
        """Something worth a warning."""


def usable_tracklets(split: Split, listener: Listener) -> list[Tracklet]:
    """The training tracklets that can teach anything.

    An identity with a single tracklet has no positive, and people seen by one camera alone teach
    nothing about another.

    Raises:
        DatasetError: Nobody is left, or there is one camera only.
    """
    cameras = {one.camera for one in split.train}
    if len(cameras) < 2:
        raise DatasetError(
            f"expected training tracklets of at least two cameras, got {len(cameras)}: "
            f"{', '.join(sorted(cameras)) or 'none at all'}"
        )
    count: dict[str, int] = defaultdict(int)
    for one in split.train:
        count[one.identity] += 1
    usable = [one for one in split.train if count[one.identity] > 1]
    if len(usable) < len(split.train):
        listener.warned(
            f"{len(split.train) - len(usable)} identities with a single tracklet are left out: "
            "they have no positive"
        )
    if not usable:
        raise DatasetError(
            f"expected training identities with at least two tracklets each, got {len(count)} "
            "identities with one each"
        )
    return usable


def make_sampler(
    tracklets: Sequence[Tracklet], batch: BatchConfig, seed: int, ranks: Ranks
) -> Sampler:
    """What draws batches as a recipe says.

    Raises:
        TrainingError: There are too few identities, or frames, for one batch.
    """
    if batch.draw == "clips":
        return ClipSampler(
            tracklets,
            clips=batch.identities * batch.tracklets,
            frames=batch.frames,
            seed=seed,
            rank=ranks.rank,
            ranks=ranks.count,
        )
    return PKSampler(
        tracklets,
        identities=batch.identities,
        per_identity=batch.tracklets,
        seed=seed,
        rank=ranks.rank,
        ranks=ranks.count,
    )


class Trainer:
    """One training run.

    Args:
        job: What to do.
        folder: Where the run lives.
        ranks: Which of several processes this is.
        listener: Hears of it; that of rank 0 should speak.

    Raises:
        DatasetError: The split cannot be trained on.
        CheckpointError: The weights to begin with cannot be had.
        TrainingError: The folder holds another run.
    """

    def __init__(
        self,
        job: Job,
        folder: RunFolder,
        *,
        ranks: Ranks | None = None,
        listener: Listener | None = None,
    ) -> None:
        self.job, self.folder = job, folder
        self.ranks, self.listener = ranks or Ranks(), listener or Listener()
        self.recipe = recipe = job.recipe
        self.device = choose_device(job.device)
        if self.device.type == "cuda" and self.ranks.count > 1:
            self.device = torch.device("cuda", self.ranks.local)
        self.precision = choose_precision(recipe.optimiser.precision, self.device)
        self.tracklets = usable_tracklets(job.split, self.listener)
        if recipe.within_class is not None:
            twice_seen(self.tracklets)  # rather now than after the last step
        sampler = make_sampler(self.tracklets, recipe.batch, job.seed, self.ranks)
        frames = [path for one in self.tracklets for path in one.frames]
        self.store = FrameStore(frames, recipe.preprocessing, sharers=self.ranks.count)
        self.loader = ClipLoader(
            self.tracklets,
            sampler,
            self.store,
            recipe.batch,
            recipe.augmentation,
            teacher=job.teacher,
            workers=job.workers,
            processes=self.device.type == "cuda",
            plain=None if recipe.distillation is None else recipe.distillation.plain,
        )
        self.learner = self._build()
        self.parallel: nn.Module = self.learner
        if self.ranks.count > 1:
            ids = [self.device] if self.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(self.learner, device_ids=ids)
        self.average: AveragedModel | None = None
        if recipe.optimiser.ema:
            self.average = AveragedModel(
                self.learner.network,
                multi_avg_fn=get_ema_multi_avg_fn(recipe.optimiser.ema),  # type: ignore[no-untyped-call]
                use_buffers=True,
            )
        self.optimiser = torch.optim.Adam(
            [one for one in self.learner.parameters() if one.requires_grad],
            lr=recipe.optimiser.rate,
            weight_decay=recipe.optimiser.decay,
            fused=True,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.moment = Moment()
        self._unread: deque[_Unread] = deque()
        self._kept: Checkpoint | None = None
        self._stop: int | None = None
        self._window = _Window()
        self._health = HealthWatch(
            count_cells(recipe),
            recipe.loss.margin if recipe.loss.triplet else None,
            has_attention=recipe.network.attention != "none",
        )

    def _build(self) -> Learner:
        if self.folder.has_state:
            # The state has the weights; where they began is on record.
            network = TrackletNet(self.recipe.network)
            self._start = self.folder.read_facts().get("start", {})
        else:
            network, self._start = start_network(self.recipe, self.job.seed)
        teacher_dim = None if self.job.teacher is None else self.job.teacher.dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.job.seed)
            learner = Learner(network, self.recipe, len(self.loader.labels), teacher_dim)
        if self.recipe.optimiser.sync_batch_norm and self.ranks.count > 1:
            if self.device.type != "cuda":
                raise TrainingError(
                    f"expected GPUs for optimiser.sync_batch_norm, got {self.device}"
                )
            converted = nn.SyncBatchNorm.convert_sync_batchnorm(learner)  # type: ignore[no-untyped-call]
            if not isinstance(converted, Learner):
                raise TrainingError("expected batch normalisation that can be synchronised")
            learner = converted
        learner.network.backbone.to(memory_format=torch.channels_last)
        learner = learner.to(self.device).train()
        if self.recipe.optimiser.keep_batch_norm:
            for module in learner.network.backbone.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return learner

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in an epoch."""
        return -(-len(self.loader) // self.recipe.batch.accumulate)

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        return self.steps_per_epoch * self.recipe.optimiser.epochs

    def run(self) -> Path | None:
        """Train to the end, from where the run stands.

        Returns:
            The checkpoint; None where a signal stopped the run, whose state is then saved.

        Raises:
            TrainingError: The loss is no number any more, or something could not be written.
            DatasetError: Frames cannot be decoded.
        """
        if self.ranks.is_first:
            known = self.folder.begin(self.recipe, self._facts())
            if known:
                self._compare_threads()
        self.ranks.wait()
        if self.folder.is_finished:
            self.listener.said(f"this run is finished: {self.folder.product}")
            return self.folder.product
        self._restore()
        self.store.preload(self.listener.loaded)
        if self.device.type == "cuda":
            # Batches are all of one size: the fastest kernels are worth looking for.
            torch.backends.cudnn.benchmark = True
        with self._signals(), self._tensorboard() as board:
            self._board = board
            try:
                self._train()
            finally:
                self.loader.close()
        if self._stop is not None:
            return None
        return self._finish()

    def _facts(self) -> dict[str, Any]:
        """What decides the weights besides the recipe."""
        teacher = self.job.teacher
        facts = {
            "seed": self.job.seed,
            "data": dict(self.job.data),
            "ranks": self.ranks.count,
            "teacher": None if teacher is None else teacher.teacher,
            "start": self._start,
        }
        if teacher is not None and teacher.views > 1:
            facts["looks"] = VIEWS_FORMAT
        return facts

    def _compare_threads(self) -> None:
        before = self.folder.read_facts().get("versions", {}).get("threads")
        if before != torch.get_num_threads():
            self.listener.warned(
                f"this run began with {before} threads and goes on with {torch.get_num_threads()}: "
                "sums are taken in another order, so its weights may differ in their last bits"
            )

    def _train(self) -> None:
        self._began, self._begun_at, self._frames = time.monotonic(), self.moment, 0
        self._saved_at = self._began
        if self.moment.batch == 0:
            self._measure(self.moment.epoch)  # unless that was done before the interruption
        for epoch in range(self.moment.epoch, self.recipe.optimiser.epochs):
            batches = self.loader.epoch(epoch, self.moment.batch)
            with contextlib.closing(batches):
                self._train_epoch(epoch, batches)
            if self._is_stopped():
                return
            self._measure(epoch + 1)
            if self._is_stopped():
                self._save()
                return

    def _train_epoch(self, epoch: int, batches: Iterator[Batch]) -> None:
        first, last = self.moment.batch, len(self.loader) - 1
        group: list[Batch] = []
        for number, batch in enumerate(self._checked(batches), start=first):
            group.append(batch)
            if len(group) < self.recipe.batch.accumulate and number < last:
                continue
            loss = self._step(group, epoch, number)
            self._frames += sum(one.clips.shape[:2].numel() for one in group) * self.ranks.count
            group = []
            ended = number == last
            elapsed = self._begun_at.elapsed_s + time.monotonic() - self._began
            self.moment = Moment(
                epoch + ended, 0 if ended else number + 1, self.moment.step + 1, elapsed
            )
            self._tell(epoch, loss)
            if ended:
                self._read_rest()
            if self._is_stopped():
                self._save()
                return
            if self.ranks.any(time.monotonic() - self._saved_at > self.job.save_every_s):
                self._save()

    def _is_stopped(self) -> bool:
        """Whether any rank was told to stop, before the last step; all ranks must ask."""
        if self.moment.step == self.steps:  # nothing is left but to finish
            self._stop = None
        if self.ranks.any(self._stop is not None):
            self._stop = self._stop or signal.SIGTERM
            return True
        return False

    def _checked(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        with self._saved_where_frames_fail():
            yield from batches

    @contextmanager
    def _saved_where_frames_fail(self) -> Iterator[None]:
        try:
            yield
        except InvalidFramesError as error:
            self._save()
            raise DatasetError(
                f"{error}; the run is saved at step {self.moment.step} and goes on once that very "
                "file is restored (`passerby check-data` lists all such frames); other data make "
                "another run, which needs another --output"
            ) from error

    def _step(self, group: list[Batch], epoch: int, number: int) -> float:
        config = self.recipe.optimiser
        rate = config.rate_at(epoch, number / len(self.loader))
        for parameters in self.optimiser.param_groups:
            parameters["lr"] = rate
        self.optimiser.zero_grad(set_to_none=True)
        losses = []
        for place, batch in enumerate(group):
            with self._gradients_meet(last=place == len(group) - 1):
                loss = self._loss(batch, rate)
                self.scaler.scale(loss / len(group)).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        if config.clip_norm:
            self.scaler.unscale_(self.optimiser)
            nn.utils.clip_grad_norm_(self.learner.parameters(), config.clip_norm)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.learner.network)
        return self._read(_Unread(losses, group, self.moment))

    @contextmanager
    def _gradients_meet(self, *, last: bool) -> Iterator[None]:
        """Let ranks exchange gradients with the last batch of a step alone."""
        if isinstance(self.parallel, DistributedDataParallel) and not last:
            with self.parallel.no_sync():
                yield
        else:
            yield

    def _loss(self, batch: Batch, rate: float) -> Tensor:
        clips = batch.clips.to(self.device, non_blocking=True)
        labels = batch.labels.to(self.device, non_blocking=True)
        teacher = self._teach(batch, clips)
        with torch.autocast(
            self.device.type, DTYPES[self.precision], enabled=self.precision != "fp32"
        ):
            learned: Learned = self.parallel(clips, teacher)
        encoded = learned.encoded
        gather = self.ranks.gather
        labels = gather(labels)
        logits = None if learned.logits is None else gather(learned.logits)
        attention = gather(encoded.attention)
        embeddings = encoded.embeddings
        if self.recipe.network.unit:  # the triplet loss compares what will be compared
            embeddings = unit_length(embeddings)
        terms = total_loss(self.recipe.loss, gather(embeddings), logits, labels, attention)
        loss = terms.total
        if learned.distilled is not None:
            loss = loss + learned.distilled.total
        self._window.add(_measured(terms, learned, logits, labels, attention, loss, rate))
        return loss

    def _teach(self, batch: Batch, clips: Tensor) -> Tensor | None:
        """What the teacher says of a batch, whose clips are on the device: (B, T, D_t)."""
        if self.job.teacher is None:
            return None
        if isinstance(self.job.teacher, LiveTeacher):
            return self.job.teacher.see(clips)
        paths = [
            self.tracklets[number].frames[position]
            for number, positions in zip(batch.tracklets, batch.positions, strict=True)
            for position in positions
        ]
        views = [view for one in batch.views for view in one]
        embeddings = torch.from_numpy(self.job.teacher.of(paths, views))  # (B*T, D_t)
        return embeddings.view(*batch.clips.shape[:2], -1).to(self.device)

    def _read(self, made: "_Unread") -> float:
        """The mean loss of a step; on a GPU that of the step before, which is ready to be read.

        To ask for the loss of the step that was just begun is to wait until it is over.
        """
        self._unread.append(made)
        behind = 1 if self.device.type == "cuda" else 0
        return self._looked_at(self._unread.popleft() if len(self._unread) > behind else made)

    def _read_rest(self) -> None:
        """Look at what was left unread, before an epoch's weights are measured or kept."""
        while self._unread:
            self._looked_at(self._unread.popleft())

    def _looked_at(self, step: "_Unread") -> float:
        """The mean loss of a step.

        Raises:
            TrainingError: One is no number.
        """
        losses = torch.stack(step.losses).tolist()
        for loss, batch in zip(losses, step.batches, strict=True):
            if not math.isfinite(loss):
                self._refuse_loss(loss, batch, step.moment)
        return float(sum(losses) / len(losses))

    def _refuse_loss(self, loss: float, batch: Batch, moment: Moment) -> None:
        members = [self.tracklets[number] for number in batch.tracklets]
        names = [f"{one.identity}/{one.camera}/{one.name}".rstrip("/") for one in members]
        raise TrainingError(
            f"the loss is {loss} after {moment.step} steps, in epoch {moment.epoch}, "
            f"batch {moment.batch}, of {', '.join(names)}; {ADVICE}"
        )

    def _tell(self, epoch: int, loss: float) -> None:
        spent = time.monotonic() - self._began
        done = self.moment.step - self._begun_at.step
        left = (self.steps - self.moment.step) * spent / done
        pace = self._frames / spent
        self.listener.progress(Progress(self.moment.step, self.steps, epoch, loss, pace, left))
        if self.moment.step % LOG_EVERY_STEPS and self.moment.step != self.steps:
            return
        averages = self._window.take()
        self._log({"epoch": epoch, **averages, "frames_per_s": round(pace, 1)})
        for text in self._health.look(averages):
            self.listener.warned(text)
            self._log({"epoch": epoch, "warning": text})

    def _log(self, values: Mapping[str, Any]) -> None:
        if not self.ranks.is_first:
            return
        time_s = round(self._begun_at.elapsed_s + time.monotonic() - self._began, 3)
        self.folder.log({"step": self.moment.step, "time_s": time_s, **values})
        try:
            for name, value in values.items():
                if self._board is not None and isinstance(value, float):
                    self._board.add_scalar(name, value, self.moment.step)
        except OSError as error:  # its own thread failed to write; the run does not need it
            self._board = None
            self.listener.warned(f"TensorBoard could not write: {error.strerror}")

    def _measure(self, epoch: int) -> None:
        every = self.recipe.monitor.every_epochs
        last = epoch == self.recipe.optimiser.epochs
        if not every or self.job.measure is None or (epoch % every and not last):
            return
        if self.ranks.is_first and not self._is_measured(epoch):
            measured = dict(self.job.measure(self._product()))
            self._log({"epoch": epoch, "measured": epoch, **measured})
            self.listener.said(f"after epoch {epoch}: {_shown(measured)}")
        ends_normalised = last and self.recipe.within_class is not None
        if ends_normalised and self.ranks.is_first and not self._is_measured(epoch, True):
            measured = dict(self.job.measure(self._finished()))
            self._log({"epoch": epoch, "measured": epoch, "normalised": True, **measured})
            self.listener.said(f"normalised: {_shown(measured)}")
        self.ranks.wait()

    def _is_measured(self, epoch: int, normalised: bool = False) -> bool:
        """Whether that was done, and logged, before an interruption."""
        return any(
            row.get("measured") == epoch and row.get("normalised", False) == normalised
            for row in self.folder.read_log()
        )

    def _product(self) -> Checkpoint:
        """The network as it would be kept now, on the CPU."""
        kept = self.learner.network if self.average is None else self.average.module
        with torch.device("meta"):
            network = TrackletNet(self.recipe.network)
        state = {name: one.detach().cpu().clone() for name, one in kept.state_dict().items()}
        if share := self.recipe.optimiser.blend:
            begun, _ = start_network(self.recipe, self.job.seed)
            for name, before in begun.state_dict().items():
                if before.is_floating_point():
                    state[name].lerp_(before, share)
        network.load_state_dict(state, assign=True)
        provenance = {
            "recipe": recipe_values(without_places(self.recipe)),
            "data": {**self.job.data, "seed": self.job.seed},
            "start": self._start,
            "epochs": self.recipe.optimiser.epochs,
            "steps": self.moment.step,
        }
        return make_checkpoint(network, self.recipe.preprocessing, provenance)

    def _finished(self) -> Checkpoint:
        """What is kept after the last step: the network, normalised if the recipe says so."""
        if self._kept is None:
            self._kept = self._product()
            config = self.recipe.within_class
            if config is not None:
                self._kept = self._normalised(self._kept, config)
        return self._kept

    def _normalised(self, made: Checkpoint, config: WithinClassConfig) -> Checkpoint:
        embedder = Embedder(made, device=str(self.device), precision=self.precision)
        with self._saved_where_frames_fail():
            people = normalise_head(
                made.network,
                embedder,
                self.tracklets,
                config,
                lambda one, n: self.store.read(one.frames[n]),
                self.listener.normalised,
            )
        provenance = {**made.provenance, "normalised_by_people": people}
        return make_checkpoint(made.network, made.preprocessing, provenance)

    def _finish(self) -> Path:
        if self.ranks.is_first:
            # Before the state goes, because a full disk may refuse it.
            self._save()
            try:
                save_checkpoint(self._finished(), self.folder.product)
            except CheckpointError as error:
                raise TrainingError(
                    f"{error}; the run is saved, the same command writes it again"
                ) from error
            self.folder.drop_state()
        self.ranks.wait()
        return self.folder.product

    def _save(self) -> None:
        if self.ranks.is_first:
            self._refuse_bad_weights()
            scaler = self.scaler.state_dict()
            extra = (
                {"scale": scaler["scale"], "growth": scaler["_growth_tracker"]} if scaler else {}
            )
            self.folder.save_state(self._tensors(), self.moment, extra)
        self._saved_at = time.monotonic()

    def _refuse_bad_weights(self) -> None:
        if all(bool(one.isfinite().all()) for one in self.learner.parameters()):
            return
        raise TrainingError(
            f"the weights hold NaN or infinity after {self.moment.step} steps; {ADVICE}"
        )

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"learner.{name}": one for name, one in self.learner.state_dict().items()}
        if self.average is not None:
            tensors |= {f"ema.{name}": one for name, one in self.average.state_dict().items()}
        for number, values in self.optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{key}": value for key, value in values.items()}
        return tensors

    def _restore(self) -> None:
        saved = self.folder.load_state()
        if saved is None:
            if self.ranks.is_first:
                self.folder.rewind_log(-1)
            return
        tensors, self.moment, extra = saved
        self.learner.load_state_dict(_under("learner.", tensors))
        if self.average is not None:
            self.average.load_state_dict(_under("ema.", tensors))
        state: dict[int, dict[str, Tensor]] = defaultdict(dict)
        parameters = [one for group in self.optimiser.param_groups for one in group["params"]]
        for name, tensor in _under("adam.", tensors).items():
            number, key = name.split(".")
            if tensor.ndim:
                # The fused step walks through memory: averages must lie as their parameter does.
                tensor = torch.empty_like(parameters[int(number)]).copy_(tensor)
            state[int(number)][key] = tensor
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": dict(state), "param_groups": groups})
        if extra:
            known = self.scaler.state_dict()
            growth = int(extra["growth"])
            self.scaler.load_state_dict(
                {**known, "scale": extra["scale"], "_growth_tracker": growth}
            )
        if self.ranks.is_first:
            self.folder.rewind_log(self.moment.step)
        self.listener.said(
            f"going on after step {self.moment.step} of {self.steps}, epoch {self.moment.epoch}"
        )

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM end the run after the step; a second one ends the process."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def stop(number: int, _: FrameType | None) -> None:
            self._stop = number
            signal.signal(number, before[signal.Signals(number)])
            if self.ranks.is_first:
                # A console that is printing must not be entered again from a handler.
                os.write(2, b"\nstopping after this step; once more to stop without saving\n")

        for number in before:
            signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def _tensorboard(self) -> Iterator[Any]:
        if not self.ranks.is_first:
            yield None
            return
        if importlib.util.find_spec("tensorboard") is None:
            self.listener.said("no TensorBoard: pip install 'passerby[train]' brings it")
            yield None
            return
        from torch.utils.tensorboard import SummaryWriter  # optional, and slow to import

        board = SummaryWriter(self.folder.path / "tensorboard", purge_step=self.moment.step + 1)
        try:
            yield board
        finally:
            with contextlib.suppress(OSError):  # a full disk: the log has it all, too
                board.close()

    @property
    def stopped_by(self) -> int:
        """Number of the signal that stopped the run, here or in another rank."""
        return self._stop or signal.SIGTERM


class _Unread(NamedTuple):
    """The losses of a step, on the device.

    Args:
        losses: One for each batch.
        batches: What was shown.
        moment: Where the step began.
    """

    losses: list[Tensor]
    batches: list[Batch]
    moment: Moment


class _Window:
    """Averages over the batches since the last logged line, kept on the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def take(self) -> dict[str, float]:
        averages = {name: float(total) / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return averages


def _measured(
    terms: LossTerms,
    learned: Learned,
    logits: Tensor | None,
    labels: Tensor,
    attention: Tensor,
    loss: Tensor,
    rate: float,
) -> dict[str, Tensor]:
    """What is logged of a batch."""
    measured = {"loss": loss, "rate": torch.tensor(rate), "identity": terms.identity}
    measured["effective_positions"] = effective_positions(attention)
    measured["regulariser_excess"] = regulariser_excess(attention)
    measured["coverage_cv2"] = coverage_cv2(attention)
    measured["regulariser"] = terms.regulariser
    if terms.triplet is not None:
        measured["triplet"] = terms.triplet.loss
        measured["active"] = terms.triplet.active
        measured["positive"] = terms.triplet.positive
        measured["negative"] = terms.triplet.negative
    if logits is not None:
        measured["accuracy"] = identity_accuracy(logits, labels)
        measured["wrong_logit"] = wrong_logit_mean(logits, labels)
    if learned.distilled is not None:
        measured["similarity"] = learned.distilled.similarity
        measured["embedding"] = learned.distilled.embedding
    return measured


def _shown(measured: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in measured.items())


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def count_cells(recipe: Recipe) -> int:
    """Cells of a frame's attention map."""
    with torch.device("meta"):
        backbone = build_backbone(recipe.network.backbone).eval()
        frame = torch.empty(1, 3, recipe.preprocessing.height, recipe.preprocessing.width)
        _, _, rows, columns = backbone(frame).shape
    return int(rows * columns)
