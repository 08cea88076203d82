"""A GPU as what computes frame embeddings: recorded for a few frame counts, fed without waiting.

All kernels of a forward pass are recorded once for each of a few frame counts, as a CUDA graph, and
replayed together from then on; other counts are padded to the next. Frames travel through pinned
memory on a stream of their own while the card computes what came before.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from model.cudnn_layers import with_fused_convolutions
from model.frames import Clip, Preprocessing
from model.network import TrackletNet
from model.runtimes import Collect, Resolved, TorchRuntime

log = logging.getLogger(__name__)
# The least that is recorded: a tracklet of 15 frames, which is the default, and one to spare.
SMALLEST = 16
# Batches on their way at a time: one computes while the next is brought.
LANES = 2
# A way that is further from plain kernels than this, relative to its length, computes something
# else.
LIMITS = {"fp32": 1e-3, "bf16": 2e-2, "fp16": 2e-2}

# From frames (n, height, width, 3) uint8 to embeddings (n, D) and attention (n, H, W), all on the
# card.
Step = Callable[[Tensor], tuple[Tensor, Tensor]]


def choose_sizes(max_frames: int) -> tuple[int, ...]:
    """Frame counts to record: at most half as much again as the one before, up to the largest."""
    sizes, size = {max_frames}, SMALLEST
    while size < max_frames:
        sizes |= {size, min(size * 3 // 2, max_frames)}
        size *= 2
    return tuple(sorted(sizes))


class Card:
    """What of CUDA is used here; nothing waits for the card but what `mark` gives and `record`.

    Args:
        device: Which one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._compute = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._transfer = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool: Any = None

    def allocate(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised memory on the card."""
        return torch.empty(shape, dtype=dtype, device=self._device)

    def pin(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised memory of the host that the card reads and writes by itself."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def upload(self, source: Tensor, target: Tensor) -> None:
        """Bring pinned memory to the card; what is enqueued later comes after it."""
        with torch.cuda.stream(self._transfer):
            target.copy_(source, non_blocking=True)
        self._compute.wait_stream(self._transfer)

    def enqueue(self, work: Callable[[], None]) -> None:
        """Call something that launches kernels, or copies to pinned memory without waiting."""
        with torch.cuda.stream(self._compute):
            work()

    def mark(self) -> Callable[[], None]:
        """What waits for all that was enqueued up to now."""
        # One that blocks: a thread that spins meanwhile takes a core from those that decode.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._compute)
        return event.synchronize

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what launches kernels; its tensors must stay where they are.

        Returns:
            What launches them again, to be enqueued.
        """
        # What happens only once, such as choosing algorithms, must not be recorded.
        for _ in range(3):
            self.enqueue(work)
        graph = torch.cuda.CUDAGraph()
        # Another thread's allocations, for another model say, must not spoil the recording.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._compute, capture_error_mode="thread_local"
        ):
            work()
        # Never two at a time, and what one makes is taken before the next starts: so all share
        # the memory of the largest, which comes first.
        self._pool = graph.pool()
        return graph.replay


class _Lane:
    """Memory for one batch on its way to the card and back."""

    def __init__(self, card: Card, frame: Sequence[int], made: Sequence[Tensor], most: int) -> None:
        self.frames = card.pin(most, *frame, dtype=torch.uint8)
        self.arrived = card.allocate(most, *frame, dtype=torch.uint8)
        self.made = [card.pin(most, *one.shape[1:], dtype=torch.float32) for one in made]
        self.flight: _Flight | None = None


class _Flight:
    """One batch in a lane; whoever needs its result, or its lane, lands it."""

    def __init__(self, lane: _Lane, count: int, wait: Callable[[], None]) -> None:
        self._lane, self._count, self._wait = lane, count, wait
        self._result: tuple[Tensor, Tensor] | None = None

    def land(self) -> tuple[Tensor, Tensor]:
        """Wait, copy the result out of the lane's memory and leave it; later calls do nothing."""
        if self._result is None:
            self._wait()
            embeddings, maps = (one[: self._count].clone() for one in self._lane.made)
            self._result = embeddings, maps
            self._lane.flight = None
        return self._result


class Lanes:
    """The way of frames to the card, through what is recorded for their number, and back.

    Args:
        card: Where.
        ways: By name what computes, best first. One that fails, or computes something else than the
            last, gives way to the next; where nothing can be recorded the last computes unrecorded.
        frame: Shape of one, (height, width, 3).
        max_frames: At once.
        limit: See `LIMITS`.

    Attributes:
        way: Name of the one that computes, "unrecorded" for the last resort.

    Raises:
        torch.OutOfMemoryError: The card does not hold so many frames at once.
    """

    def __init__(
        self,
        card: Card,
        ways: dict[str, Callable[[], Step]],
        frame: Sequence[int],
        *,
        max_frames: int,
        limit: float,
    ) -> None:
        self._card, self._limit = card, limit
        self.sizes = choose_sizes(max_frames)
        self._plain = list(ways.values())[-1]()
        self._frames = card.allocate(max_frames, *frame, dtype=torch.uint8)
        generator = torch.Generator().manual_seed(0)
        few = torch.randint(0, 256, (min(SMALLEST, max_frames), *frame), generator=generator)
        self._frames[: len(few)].copy_(few)
        self._expected = [one.clone() for one in self._plain(self._frames[: len(few)])]
        self._made = [
            card.allocate(max_frames, *one.shape[1:], dtype=torch.float32) for one in self._expected
        ]
        self._lanes = [_Lane(card, frame, self._expected, max_frames) for _ in range(LANES)]
        self._next = 0
        self._recorded: dict[int, Callable[[], None]] = {}
        self._step = self._plain
        self.way = "unrecorded"
        for name, make in ways.items():
            if self._try_way(name, make):
                self.way = name
                break

    def _try_way(self, name: str, make: Callable[[], Step]) -> bool:
        try:
            # Kept, because what is recorded reads the memory of its weights and constants.
            self._step = step = make()
            # The largest first: the others then find room in its memory.
            for size in reversed(self.sizes):
                self._recorded[size] = self._card.record(self._work(step, size))
            self._check(name)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            log.warning("a forward pass could not be recorded, %s: %s", name, error)
            self._recorded = {}
            return False
        return True

    def _check(self, name: str) -> None:
        """Compare what was recorded, at the least size, with plain kernels."""
        self._card.enqueue(self._recorded[self.sizes[0]])
        self._card.mark()()
        for made, expected in zip(self._made, self._expected, strict=True):
            error = ((made[: len(expected)] - expected).norm() / expected.norm()).item()
            if not error < self._limit:
                raise RuntimeError(
                    f"expected a relative error under {self._limit} of {name}, got {error:.1e}"
                )

    def _work(self, step: Step, size: int) -> Callable[[], None]:
        frames = self._frames[:size]

        def work() -> None:
            for made, target in zip(step(frames), self._made, strict=True):
                target[:size].copy_(made)

        return work

    def launch(self, pieces: Sequence[Clip]) -> Collect:
        """See `model.runtimes.FrameRuntime.launch`."""
        lane = self._lanes[self._next]
        if lane.flight is not None:
            lane.flight.land()
        count = 0
        for piece in pieces:
            # PyTorch's copy shares the work among threads.
            lane.frames[count : count + len(piece)].copy_(torch.from_numpy(piece))
            count += len(piece)
        self._card.upload(lane.frames[:count], lane.arrived[:count])
        self._card.enqueue(lambda: self._run(lane, count))
        lane.flight = _Flight(lane, count, self._card.mark())
        self._next = (self._next + 1) % len(self._lanes)
        return lane.flight.land

    def _run(self, lane: _Lane, count: int) -> None:
        self._frames[:count].copy_(lane.arrived[:count])
        if self._recorded:
            self._recorded[next(size for size in self.sizes if size >= count)]()
        else:
            self._work(self._plain, count)()
        for made, target in zip(self._made, lane.made, strict=True):
            target[:count].copy_(made[:count], non_blocking=True)


class CudaRuntime:
    """PyTorch on a GPU: kernel after kernel until `warm_up` has recorded them, recorded then.

    Args:
        network: In eval mode, with its backbone in ``precision``, on ``device``.
        preprocessing: Of its frames.
        device: Where it computes.
        precision: Of the backbone.
        card: Of the device; a test's may be another.
    """

    overlaps = True

    def __init__(
        self,
        network: TrackletNet,
        preprocessing: Preprocessing,
        device: torch.device,
        precision: Resolved,
        card: Card | None = None,
    ) -> None:
        self._eager = TorchRuntime(network, preprocessing, device, precision)
        self._network, self._preprocessing = network, preprocessing
        self._device, self._precision = device, precision
        self._card = card
        self._lanes: Lanes | None = None

    @property
    def way(self) -> str:
        """How it computes: see `Lanes`."""
        return "unrecorded" if self._lanes is None else self._lanes.way

    @torch.no_grad()
    def warm_up(self, max_frames: int) -> None:
        """See `model.runtimes.FrameRuntime.warm_up`."""
        if self._lanes is None:
            size = self._preprocessing
            with on_device(self._device), without_tf32(self._precision):
                self._lanes = Lanes(
                    self._card or Card(self._device),
                    self._make_ways(),
                    (size.height, size.width, 3),
                    max_frames=max_frames,
                    limit=LIMITS[self._precision],
                )
            log.info("%s is warm, %s", self._device, self._lanes.way)

    def _make_ways(self) -> dict[str, Callable[[], Step]]:
        # Not torch.compile: on an H200 it is 6 % faster than fused convolutions at 256x128, no
        # faster at 128x64, takes 20 s to start and a compiler (docs/performance.md).
        ways: dict[str, Callable[[], Step]] = {}
        if self._device.type == "cuda":
            ways["fused"] = self._make_fused
        return ways | {"plain": lambda: self._eager.step}

    def _make_fused(self) -> Step:
        network = with_fused_convolutions(self._network)
        return TorchRuntime(network, self._preprocessing, self._device, self._precision).step

    @torch.no_grad()
    def launch(self, pieces: Sequence[Clip]) -> Collect:
        """See `model.runtimes.FrameRuntime.launch`."""
        with on_device(self._device), without_tf32(self._precision):
            return (self._lanes or self._eager).launch(pieces)


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Make a card the current one; nothing for a CPU."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield


@contextmanager
def without_tf32(precision: Resolved) -> Iterator[None]:
    """Multiply float32 as float32, where that was asked for: PyTorch's default keeps 10 bits.

    It is a switch of the whole process: what another thread computes meanwhile is exact, too.
    """
    if precision != "fp32":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    switches: tuple[Any, ...] = (cudnn.conv, torch.backends.cuda.matmul)
    # Only what is on: PyTorch's older switches answer no more once a newer one was set.
    changed = [switch for switch in switches if switch.fp32_precision == "tf32"]
    for switch in changed:
        switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        for switch in changed:
            switch.fp32_precision = "tf32"
