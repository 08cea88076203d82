"""Kills the commands that move a gallery, or write to one beside a service.

Each is killed at random over its whole run, and before, in the middle of and after the system
calls by which it changes files, so that each kind of call on each kind of file has its turn. What
was there is there then, unchanged, or what was to be made is, whole; nobody who was erased is in
either; and given again the command does its work and leaves nothing lying about.
"""

import faulthandler
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np

from bench.gallery_kills import listening
from bench.gallery_kills_calls import Call, Death, End, can_trace, run_traced
from bench.gallery_kills_scenes import (
    GALLERY,
    INDEX,
    Outcome,
    Scene,
    Stock,
    check_leftovers,
    check_right,
    look,
    read_aside,
    scenes,
)
from bench.gallery_truth import MismatchError
from index.embedded import EmbeddedGallery
from index.gallery import GalleryError
from index.restore import REPLACED_NAME
from index.snapshot import snapshot

faiss: Any = _faiss  # its type stubs know C++'s signatures, not those of its Python layer
# Of three kills of a scene one is at random; of those, so many are of a process that is started
# as a person starts it, which takes seconds.
_RANDOM_EVERY = 3
_STARTED_EVERY = 20
_DRAWN = re.compile(r"(?<=replaced-)\w+|(?<=strips/)\d+|(?<=audit/)\S+")
Progress = Callable[[int, "MovingToll"], None]


@dataclass
class MovingToll:
    """What became of the killed commands.

    Args:
        kills: How many, by scene.
        done: How many of these had done their work.
        points: Killed at which calls on which files, by scene.
        known: How many such points there are, by scene.
        missed: Lives that were over before.
        warnings: What opening what was left had to mend, by message.
    """

    kills: Counter[str] = field(default_factory=Counter)
    done: Counter[str] = field(default_factory=Counter)
    points: dict[str, Counter[str]] = field(default_factory=dict)
    known: dict[str, int] = field(default_factory=dict)
    missed: int = 0
    warnings: Counter[str] = field(default_factory=Counter)

    def report(self) -> str:
        """As lines of text."""
        killed, done = sum(self.kills.values()), sum(self.done.values())
        lines = [f"{killed} kills, {done} after all was done; {self.missed} more came too late"]
        for name, count in self.kills.items():
            seen = self.points.get(name, Counter())
            at_random = count - sum(seen.values())
            lines.append(
                f"{count:6}  {name}: {at_random} at random, the others at {len(seen)} of "
                f"{self.known[name]} kinds of call; {self.done[name]} had done their work"
            )
        lines += [f"{count:6}  warning: {text}" for text, count in self.warnings.most_common()]
        return "\n".join(lines)


@dataclass
class _Known:
    """What is known of a scene from runs that nobody kills.

    Args:
        before: What there is.
        after: What there is when it is done.
        points: The numbers of calls by what they do, in order of their first.
        takes_s: How long it takes.
        turn: How often it has been killed.
        waiting: The points that have not had their turn.
    """

    before: Outcome
    after: Outcome
    points: dict[str, list[int]]
    takes_s: float
    turn: int = 0
    waiting: list[str] = field(default_factory=list)


class MovingKiller:
    """Runs scenes in processes of their own, kills these, and looks at what they leave.

    Args:
        seed: Of where and when they die.
        folder: Where the files are for a while.
    """

    def __init__(self, seed: int, folder: Path) -> None:
        self._rng = np.random.default_rng(seed)
        self._folder = folder.resolve()
        (self._folder / "stock").mkdir()
        self._stock = Stock(self._folder / "stock")
        self._root = self._folder / "root"
        self._known: dict[str, _Known] = {}
        self.toll = MovingToll()

    def run(self, kills: int, progress: Progress, only: str = "") -> None:
        """Kill so often, each scene in turn.

        Args:
            kills: How often.
            progress: Gets how often by now.
            only: What the names of scenes have to contain.

        Raises:
            MismatchError: Something is neither as before nor as it should be.
        """
        chosen = [scene for scene in scenes() if only in scene.name]
        with listening(lambda record: self.toll.warnings.update([str(record.msg)[:80]])):
            for number in range(kills):
                scene = chosen[number % len(chosen)]
                if scene.name not in self._known:
                    self._known[scene.name] = self._learn(scene)
                self._kill_once(scene, self._known[scene.name])
                progress(number + 1, self.toll)

    def _learn(self, scene: Scene) -> _Known:
        """Run it three times to its end: to see what it does, how long that takes, and how."""
        self._lay(scene)
        before = self._look(scene)
        self._expect_done(self._run(lambda: scene.work(self._root)), scene)
        after = self._look(scene)
        check_right(scene, after)
        if scene.target is not None and before.gallery != after.gallery:
            raise MismatchError(f"{scene.name}: expected an unchanged gallery, got another")
        self._lay(scene)
        began = time.monotonic()
        self._run(lambda: scene.work(self._root))
        takes_s = time.monotonic() - began
        self._lay(scene)
        end = run_traced(self._child(lambda: scene.work(self._root)), self._root)
        self._expect_done(end.status, scene)
        points: dict[str, list[int]] = {}
        for number, call in enumerate(end.calls):
            points.setdefault(_label(call), []).append(number)
        self.toll.known[scene.name] = len(points)
        return _Known(before, after, points, takes_s)

    def _expect_done(self, status: int | None, scene: Scene) -> None:
        if status != 0:
            said = (self._folder / "said").read_text(errors="replace")[-2000:]
            raise MismatchError(f"{scene.name}: expected status 0, got {status}: {said}")

    def _kill_once(self, scene: Scene, known: _Known) -> None:
        known.turn += 1
        self._lay(scene)
        if known.turn % _RANDOM_EVERY == 0 or not can_trace():
            where, killed = self._kill_at_random(scene, known)
        else:
            where, killed = self._kill_at_a_call(scene, known)
        try:
            done = self._check(scene, known)
        except (MismatchError, GalleryError, OSError) as error:
            kept = Path(tempfile.mkdtemp(prefix="killed-")) / "root"
            shutil.copytree(self._root, kept)
            raise MismatchError(f"{scene.name}, {where} (files in {kept}): {error}") from error
        if not killed:
            self.toll.missed += 1
            return
        self.toll.kills[scene.name] += 1
        self.toll.done[scene.name] += done

    def _kill_at_random(self, scene: Scene, known: _Known) -> tuple[str, bool]:
        after_s = float(self._rng.uniform(0, 1.1 * known.takes_s))
        if scene.argv is not None and known.turn // _RANDOM_EVERY % _STARTED_EVERY == 0:
            return self._kill_started(scene.argv(self._root), known)
        child = os.fork()
        if not child:
            os._exit(self._child(lambda: scene.work(self._root))())
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        return f"at random after {after_s:.3f} s", os.WIFSIGNALED(status)

    def _kill_started(self, argv: list[str], known: _Known) -> tuple[str, bool]:
        """Kill a process that begins as a person's would, once it has begun to write."""
        command = [sys.executable, "-m", "service.cli", *argv]
        log = (self._folder / "said").open("wb")
        before = _names(self._root)
        with log, subprocess.Popen(command, stdout=log, stderr=log) as process:
            while _names(self._root) == before and process.poll() is None:
                time.sleep(0.002)
            after_s = float(self._rng.uniform(0, 1.1 * known.takes_s))
            time.sleep(after_s)
            process.kill()
            return f"started, at random after {after_s:.3f} s", process.wait() < 0

    def _kill_at_a_call(self, scene: Scene, known: _Known) -> tuple[str, bool]:
        if not known.waiting:  # each kind of call once, in any order, before one has a second turn
            known.waiting = self._rng.permutation([*known.points]).tolist()
        label = known.waiting.pop()
        numbers = known.points[label]
        # The first and the last of many are those at which something begins or ends.
        chosen = [numbers[0], numbers[-1], int(self._rng.choice(numbers))]
        number = int(self._rng.choice(chosen))
        death = Death(number, is_half_done=bool(self._rng.random() < 0.5))
        end: End = run_traced(self._child(lambda: scene.work(self._root)), self._root, death)
        how = "in the middle of, or after" if death.is_half_done else "before"
        if end.status is None:
            self.toll.points.setdefault(scene.name, Counter())[_label(end.calls[-1])] += 1
        return f"{how} call {number}, {label}", end.status is None

    def _check(self, scene: Scene, known: _Known) -> bool:
        """Look at what is left, give the command again, and look once more."""
        found = self._look(scene)
        if found not in (known.before, known.after):
            raise MismatchError(f"expected all as before or done, got {_differences(found, known)}")
        is_done = found == known.after and known.before != known.after
        aside = self._check_aside(known) if is_done else 0
        status = self._run(lambda: (scene.work if is_done else scene.again)(self._root))
        if status != 0 and not (is_done and not scene.is_repeatable):
            self._expect_done(status, scene)
        if self._look(scene) != known.after:
            raise MismatchError("given again, expected what it does, got something else")
        # The service starts, and somebody makes the next snapshot: these two clear up.
        EmbeddedGallery(self._root / GALLERY, index=INDEX).close()
        snapshot(self._root / GALLERY, self._root / "next")
        (self._root / "next").unlink()
        check_leftovers(scene, self._root, aside=aside + ("--replace" in self._argv(scene)))
        return is_done

    def _check_aside(self, known: _Known) -> int:
        """That what was replaced is kept as it was; returns how many were put aside."""
        found = [*(self._folder / "copy" / GALLERY).glob(f"{REPLACED_NAME}*")]
        for one in found:
            if read_aside(one) != known.before.gallery:
                raise MismatchError("expected the old gallery aside, got another")
        return len(found)

    def _argv(self, scene: Scene) -> list[str]:
        return [] if scene.argv is None else scene.argv(self._root)

    def _lay(self, scene: Scene) -> None:
        shutil.rmtree(self._root, ignore_errors=True)
        self._stock.lay(scene, self._root)

    def _look(self, scene: Scene) -> Outcome:
        copy = self._folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self._root, copy, symlinks=True)
        return look(scene, copy)

    def _run(self, work: Callable[[], int]) -> int | None:
        child = os.fork()
        if not child:
            os._exit(self._child(work)())
        _, status = os.waitpid(child, 0)
        return os.WEXITSTATUS(status) if os.WIFEXITED(status) else None

    def _child(self, work: Callable[[], int]) -> Callable[[], int]:
        """What a child does, with what it says in a file; it never raises."""

        def run() -> int:
            said = os.open(self._folder / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(said, 1)
            os.dup2(said, 2)
            try:
                return work()
            except BaseException as error:  # noqa: BLE001 - told to the parent, which raises
                faulthandler.dump_traceback(file=2)
                os.write(2, f"{type(error).__name__}: {error}\n".encode())
                return 70

        return run


def _names(folder: Path) -> set[Path]:
    try:
        return {*folder.rglob("*")}
    except OSError:  # something went while it was listed
        return set()


def _label(call: Call) -> str:
    return f"{call.kind} {_DRAWN.sub('...', call.target)}"


def _differences(found: Outcome, known: _Known) -> str:
    """What is neither, in numbers and names of the bench's own people."""
    told = []
    for what in ("gallery", "target"):
        state, before, after = (getattr(one, what) for one in (found, known.before, known.after))
        if state not in (before, after):
            count = None if state is None else len(state.tracklets)
            told.append(f"a {what} of {count} tracklets that is neither")
    return ", ".join(told) or "one of two things done"


def kill_moving(
    kills: int,
    *,
    seed: int,
    folder: Path | None = None,
    only: str = "",
    progress: Progress = lambda _done, _toll: None,
) -> MovingToll:
    """Kill so many commands; only in a process with a single thread.

    Args:
        kills: How many.
        seed: Of where and when they die.
        folder: Where the files are for a while.
        only: What the names of scenes have to contain.
        progress: Gets how many by now.

    Raises:
        MismatchError: Something was lost, came back, was left over, or is half done.
    """
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        raise RuntimeError(f"expected a process with one thread to fork from, got {threads}")
    faiss.omp_set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=folder) as parent:
        killer = MovingKiller(seed, Path(parent))
        killer.run(kills, progress, only)
    return killer.toll
