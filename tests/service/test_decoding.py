"""Decoding by threads and by processes: the same answers, and what goes wrong hurts one upload."""

import asyncio
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.frames import Preprocessing
from service import clip_memory, decoder_child, decoding
from service.decoder_process import (
    DECODED,
    NOWHERE,
    PLACE,
    PLACED,
    READY,
    pack_hello,
    pack_request,
    receive,
    send_all,
)
from service.decoding import Decoders
from service.errors import (
    DeadlineExceededError,
    ServiceError,
    UndecodableFrameError,
    WorkerUnavailableError,
)
from service.limits import PlainLimits
from service.logs import TextFormatter, request_id
from service.settings import LimitSettings
from service.uploads import Decoded, FrameChoice, Keep, decode_upload
from tests.service.making import GREEN, RED, encode, noise, picture, video, zipped

CHOICE = FrameChoice(15, "even", Preprocessing(height=64, width=32))
LIMITS = LimitSettings()
GOOD = {"frames": [picture(RED), picture(GREEN)]}
UPLOADS = {
    "frames": {"frames": [encode(noise(seed), "JPEG") for seed in range(40)]},
    "archive": {"archive": [zipped([("2.png", encode(noise(2))), ("1.png", encode(noise(1)))])]},
    "video": {"video": [video()]},
}

# A decoder that answers some uploads in another way, by what their first file says.
BAD_DECODER = """
import os, signal, sys
from pathlib import Path
from service import decoder_process
from service.uploads import decode_upload

def misbehave(files, choice, limits, **options):
    said, _, told = files.get("frames", [b""])[0].decode("latin-1").partition(":")
    if said == "crash" or said == "crash once" and not Path(told).exists():
        if told:
            Path(told).touch()
        os.kill(os.getpid(), signal.SIGSEGV)
    if said == "hang":
        signal.pause()
    if said == "fail":
        raise KeyError("of all things")
    if said == "wait":
        Path(told + ".begun").write_text("")  # a pipe: whoever waits for it goes on
        Path(told).read_bytes()
    if said == "lie":
        kind, frames, length = map(int, told.split())
        answer = kind, frames, 1, length, 0, 0, b"", 1, 0.0, 0.0
        head = decoder_process.ANSWER.pack(*answer)
        os.write(int(sys.argv[1]), head)
    if said in ("crash once", "wait"):
        files = {"frames": files["frames"][1:]}
    return decode_upload(files, choice, limits, **options)

decoder_process.decode_upload = misbehave
decoder_process.main()
"""


@pytest.fixture(scope="module")
def decoders() -> Iterator[Decoders]:
    """Two processes."""
    started = Decoders(CHOICE, LIMITS, processes=2)
    started.start()
    with closing(started):
        yield started


@pytest.fixture
def bad(monkeypatch: pytest.MonkeyPatch) -> Iterator[Decoders]:
    """One process that can be told to misbehave."""
    monkeypatch.setattr(decoder_child, "PROGRAM", ("-c", BAD_DECODER))
    started = Decoders(CHOICE, LIMITS, processes=1, limit_s=1.0)
    started.start()
    with closing(started):
        yield started


def run(decoders: Decoders, files: dict[str, list[bytes]], **options: Any) -> Decoded:
    """Decode one upload in a loop of its own."""
    return asyncio.run(decoders.decode(files, **options))


def told(said: str) -> dict[str, list[bytes]]:
    """An upload for `BAD_DECODER`."""
    return {"frames": [said.encode(), picture(RED)]}


def assert_same(got: Decoded, expected: Decoded) -> None:
    assert np.array_equal(got.tracklet.clip, expected.tracklet.clip)
    assert got.tracklet.clip.dtype == np.uint8
    assert got.tracklet.clip.flags.c_contiguous
    assert got.tracklet.positions == expected.tracklet.positions
    assert got.tracklet.received == expected.tracklet.received
    assert got[1:] == expected[1:]


def test_there_are_no_more_threads_than_cores_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.decoding.available_cores", lambda: 3)

    with closing(Decoders(CHOICE, LIMITS, processes=0)) as threads:
        threads.start()
        assert threads._threads is not None
        assert threads._threads._max_workers == 3


@pytest.mark.parametrize("keep", [Keep.NOTHING, Keep.STRIP, Keep.STRIP | Keep.FRAMES])
@pytest.mark.parametrize("kind", UPLOADS)
def test_a_process_answers_what_a_call_would(decoders: Decoders, kind: str, keep: Keep) -> None:
    expected = decode_upload(UPLOADS[kind], CHOICE, LIMITS, keep=keep)

    assert_same(run(decoders, UPLOADS[kind], keep=keep), expected)
    used = len(expected.tracklet.positions)
    assert len(expected.frames) == (used if Keep.FRAMES in keep else 0)


def test_a_thread_answers_what_a_call_would() -> None:
    expected = decode_upload(GOOD, CHOICE, LIMITS, keep=Keep.STRIP)

    with closing(Decoders(CHOICE, LIMITS, processes=0)) as threads:
        threads.start()
        asyncio.run(threads.check())
        assert_same(run(threads, GOOD, keep=Keep.STRIP), expected)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"frames": [picture()], "video": [b"x"]},
        {"frames": [picture(), picture(RED, (4, 4))]},
        {"frames": [b"", picture()]},
        {"frames": [encode(noise(), "JPEG")[:-200]]},
        {"archive": [b"no zip"]},
        {"video": [video()[:-2000]]},
        {"archive": [zipped((f"{number}.jpg", b"x") for number in range(513))]},
    ],
    ids=["none", "two", "tiny", "empty", "cut", "no-zip", "cut-video", "many"],
)
def test_a_refusal_comes_back_as_it_was(decoders: Decoders, files: dict[str, list[bytes]]) -> None:
    pids = decoders.pids
    with pytest.raises(ServiceError) as expected:
        decode_upload(files, CHOICE, PlainLimits.of(LIMITS))

    with pytest.raises(type(expected.value)) as got:
        run(decoders, files)

    assert str(got.value) == str(expected.value)
    assert getattr(got.value, "pointer", None) == getattr(expected.value, "pointer", None)
    assert decoders.pids == pids


def test_more_files_than_one_call_can_hand_over_arrive(decoders: Decoders) -> None:
    """The kernel takes 1,024 buffers at a time."""
    files = {"frames": [picture(RED, (8, 8))] * 1500}

    assert run(decoders, files).tracklet.received == 1500


def test_files_and_a_clip_larger_than_a_socket_holds_arrive() -> None:
    choice = FrameChoice(15, "all", Preprocessing(height=256, width=128))
    files = {"frames": [encode(noise(1, (256, 512)), "BMP")] * 20}

    with closing(Decoders(choice, LIMITS, processes=1)) as decoders:
        decoders.start()
        decoded = run(decoders, files)

    assert_same(decoded, decode_upload(files, choice, LIMITS))


def test_several_uploads_are_decoded_at_a_time_and_none_is_mixed_up(decoders: Decoders) -> None:
    uploads = [{"frames": [encode(noise(seed), "JPEG")] * (1 + seed)} for seed in range(12)]

    async def all_at_once() -> list[Decoded]:
        return await asyncio.gather(*map(decoders.decode, uploads))

    for got, files in zip(asyncio.run(all_at_once()), uploads, strict=True):
        assert_same(got, decode_upload(files, CHOICE, LIMITS))


def test_a_decoder_imports_no_network_and_no_framework() -> None:
    """Or it would take seconds to start, and hundreds of megabytes."""
    code = "import sys; from service import decoder_process; print(*sys.modules)"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    heavy = {"torch", "torchvision", "fastapi", "starlette", "pydantic", "faiss", "av", "openvino"}
    assert not heavy & set(done.stdout.split())


def test_a_decoder_holds_nothing_but_its_socket_and_its_memory(
    bad: Decoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No listening socket, no file of the gallery, no key."""
    monkeypatch.setenv("PASSERBY_API_KEYS", "secret")
    end(bad.pids[0])
    run(bad, GOOD)
    [pid] = bad.pids

    opened = [str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()]

    # The memory is for its own clips.
    kinds = sorted(one.partition(":")[0].split()[0] for one in opened)
    assert kinds == 3 * ["/dev/null"] + ["/memfd", "socket"]
    assert b"PASSERBY" not in Path(f"/proc/{pid}/environ").read_bytes()


def test_a_decoder_leaves_signals_to_its_parent(decoders: Decoders) -> None:
    """A Ctrl-C or a stopping service must not take what is at work with it."""
    pids = decoders.pids
    for number in (signal.SIGINT, signal.SIGTERM):
        for pid in pids:
            os.kill(pid, number)

    run(decoders, GOOD)

    assert decoders.pids == pids


def test_an_upload_that_kills_decoders_is_refused_alone(
    bad: Decoders, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.handler.setFormatter(TextFormatter())
    before = bad.pids

    async def decode() -> None:
        request_id.set("mine")
        await bad.decode(told("crash"))

    with pytest.raises(UndecodableFrameError, match="no decoder survived"):
        asyncio.run(decode())

    assert_same(run(bad, GOOD), decode_upload(GOOD, CHOICE, LIMITS))
    assert bad.pids != before
    lines = caplog.text.splitlines()
    assert len(lines) == decoding.ATTEMPTS
    assert all("reason=SIGSEGV" in line and "request_id=mine" in line for line in lines)


def test_a_decoder_that_dies_once_is_replaced_and_asked_again(
    bad: Decoders, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It may have been killed for memory that something else took."""
    decoded = run(bad, told(f"crash once:{tmp_path / 'mark'}"))

    assert_same(decoded, decode_upload({"frames": [picture(RED)]}, CHOICE, LIMITS))
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("kind", "frames", "length"),
    [
        (DECODED, 0, 0),
        (DECODED, 2**32 - 1, (2**32 - 1) * (64 * 32 * 3 + 4)),
        (DECODED, 1, 2**50),
        (PLACED, 16, 16 * 4),
        (17, 1, 1),
    ],
    ids=["no frame", "frames", "bytes", "more frames than a place holds", "kind"],
)
def test_a_decoder_that_answers_nonsense_is_replaced(
    bad: Decoders, kind: int, frames: int, length: int
) -> None:
    before = bad.pids

    with pytest.raises(UndecodableFrameError):
        run(bad, told(f"lie:{kind} {frames} {length}"))

    assert_same(run(bad, GOOD), decode_upload(GOOD, CHOICE, LIMITS))
    assert bad.pids != before


def test_clips_that_are_held_stay_as_they_are_while_others_are_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also those that found no place in the memory."""
    size = CHOICE.used * CHOICE.preprocessing.height * CHOICE.preprocessing.width * 3
    monkeypatch.setattr(clip_memory, "MEMORY_BYTES", 3 * size)
    uploads = [{"frames": [encode(noise(seed), "JPEG")] * (1 + seed % 4)} for seed in range(9)]

    with closing(Decoders(CHOICE, LIMITS, processes=1)) as decoders:
        decoders.start()
        held = [run(decoders, files) for files in uploads]
        del held[1:8:2]
        later = [run(decoders, files) for files in uploads]

    for got, files in zip([*held, *later], [*uploads[::2], *uploads], strict=True):
        assert_same(got, decode_upload(files, CHOICE, LIMITS))


def test_a_clip_outlives_the_decoder_that_made_it(bad: Decoders) -> None:
    clip = run(bad, GOOD).tracklet.clip

    end(bad.pids[0])
    run(bad, {"frames": [picture(GREEN)]})

    assert np.array_equal(clip, decode_upload(GOOD, CHOICE, LIMITS).tracklet.clip)


def test_without_shared_memory_clips_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a system that has none."""
    monkeypatch.delattr(os, "memfd_create")

    with closing(Decoders(CHOICE, LIMITS, processes=1)) as decoders:
        decoders.start()
        assert_same(run(decoders, GOOD), decode_upload(GOOD, CHOICE, LIMITS))


def test_a_decoder_that_takes_too_long_is_replaced(bad: Decoders) -> None:
    before = bad.pids

    with pytest.raises(DeadlineExceededError, match="within 1 s"):
        run(bad, told("hang"))

    assert_same(run(bad, GOOD), decode_upload(GOOD, CHOICE, LIMITS))
    assert bad.pids != before


def test_an_error_that_no_upload_explains_comes_back_with_its_trace(bad: Decoders) -> None:
    before = bad.pids

    with pytest.raises(RuntimeError, match=r"in misbehave(.|\n)*of all things"):
        run(bad, told("fail"))

    run(bad, GOOD)
    assert bad.pids == before


def test_cancelled_decodes_are_dropped_or_end_unheard(bad: Decoders, tmp_path: Path) -> None:
    gate, begun, mark = tmp_path / "gate", tmp_path / "gate.begun", tmp_path / "mark"
    os.mkfifo(gate)
    os.mkfifo(begun)
    before = bad.pids

    async def hang_up() -> Decoded:
        at_work = asyncio.create_task(bad.decode(told(f"wait:{gate}")))
        await asyncio.to_thread(begun.read_bytes)
        waiting = asyncio.create_task(bad.decode(told(f"crash once:{mark}")))
        await asyncio.sleep(0)  # it has been queued
        for task in (at_work, waiting):
            task.cancel()
        await asyncio.wait([at_work, waiting])
        assert at_work.cancelled()
        assert waiting.cancelled()
        await asyncio.to_thread(gate.write_bytes, b"")
        return await bad.decode(GOOD)

    assert_same(asyncio.run(hang_up()), decode_upload(GOOD, CHOICE, LIMITS))
    assert not mark.exists()
    assert bad.pids == before


def test_closing_ends_what_is_at_work_and_fails_what_waits(
    bad: Decoders, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gate, begun = tmp_path / "gate", tmp_path / "gate.begun"
    os.mkfifo(begun)
    os.mkfifo(gate)
    [pid] = bad.pids

    async def close() -> list[Any]:
        tasks = [asyncio.create_task(bad.decode(told(f"wait:{gate}")))]
        await asyncio.to_thread(begun.read_bytes)
        tasks += [asyncio.create_task(bad.decode(GOOD)) for _ in range(3)]
        await asyncio.sleep(0)  # they have been queued
        bad.close()
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(one) for one in asyncio.run(close())] == 4 * [WorkerUnavailableError]
    assert not caplog.records  # that it died is no news
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(WorkerUnavailableError, match="not running"):
        run(bad, GOOD)
    with pytest.raises(WorkerUnavailableError, match="not running"):
        asyncio.run(bad.check())


@pytest.mark.parametrize("processes", [0, 1])
def test_decoders_that_were_not_started_say_so(processes: int) -> None:
    decoders = Decoders(CHOICE, LIMITS, processes=processes)

    with pytest.raises(WorkerUnavailableError, match="not running"):
        asyncio.run(decoders.check())
    with pytest.raises(WorkerUnavailableError, match="not running"):
        run(decoders, GOOD)

    decoders.close()


def test_a_decoder_that_cannot_be_started_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_child, "PROGRAM", ("-c", "raise SystemExit(3)"))
    decoders = Decoders(CHOICE, LIMITS, processes=2)

    with pytest.raises(WorkerUnavailableError, match="cannot be started: exit status 3"):
        decoders.start()

    assert decoders.pids == []
    with pytest.raises(WorkerUnavailableError, match="not running"):
        asyncio.run(decoders.check())


def test_the_check_replaces_a_dead_decoder_or_says_that_it_cannot(
    bad: Decoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    asyncio.run(bad.check())
    with monkeypatch.context() as broken:
        broken.setattr(decoder_child, "PROGRAM", ("-c", "raise SystemExit(3)"))
        end(bad.pids[0])

        with pytest.raises(WorkerUnavailableError, match="exit status 3"):
            asyncio.run(bad.check())
        with pytest.raises(WorkerUnavailableError, match="exit status 3"):
            run(bad, GOOD)

    asyncio.run(bad.check())

    assert len(bad.pids) == 1
    run(bad, GOOD)


def test_the_check_replaces_a_decoder_that_does_not_answer(
    bad: Decoders, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(decoding, "PING_S", 0.05)
    before = bad.pids
    os.kill(before[0], signal.SIGSTOP)

    asyncio.run(bad.check())

    assert bad.pids != before
    assert "did not answer" in caplog.text
    run(bad, GOOD)


def test_without_descriptors_no_decoder_is_started_and_that_is_told(
    bad: Decoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError(24, "Too many open files")

    async def check_without() -> None:
        with monkeypatch.context() as without:  # the loop has taken what it needs
            without.setattr("socket.socketpair", fail)
            await bad.check()

    end(bad.pids[0])
    with pytest.raises(WorkerUnavailableError, match="Too many open files"):
        asyncio.run(check_without())

    asyncio.run(bad.check())
    run(bad, GOOD)


def test_the_check_tells_of_decoders_that_are_all_stuck(
    bad: Decoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = tmp_path / "gate.begun"
    os.mkfifo(begun)

    async def check() -> None:
        at_work = asyncio.create_task(bad.decode(told(f"wait:{tmp_path / 'gate'}")))
        await asyncio.to_thread(begun.read_bytes)
        await bad.check()  # nobody answers, but not for long
        monkeypatch.setattr(decoding, "ALL_BUSY_S", 0.0)
        try:
            await bad.check()
        finally:
            at_work.cancel()

    os.mkfifo(tmp_path / "gate")
    with pytest.raises(WorkerUnavailableError, match="no decoder has answered"):
        asyncio.run(check())


def end(pid: int) -> None:
    """Kill a process and wait until it is dead, which is not yet buried."""
    handle = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    assert has_ended(handle)
    os.close(handle)


def has_ended(handle: int) -> bool:
    """Wait for the end of a process."""
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(20_000))


def test_no_decoder_outlives_its_parent() -> None:
    code = """
import sys
from model.frames import Preprocessing
from service.decoding import Decoders
from service.limits import PlainLimits
from service.uploads import FrameChoice
choice = FrameChoice(1, "even", Preprocessing())
decoders = Decoders(choice, PlainLimits(1, 1, 1, 1, 1), processes=2)
decoders.start()
print(*decoders.pids, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        handles = [os.pidfd_open(int(pid)) for pid in parent.stdout.readline().split()]

        parent.kill()

        assert len(handles) == 2
        assert all(has_ended(handle) for handle in handles)
        for handle in handles:
            os.close(handle)


def test_a_decoder_that_is_stuck_when_its_parent_has_gone_ends_itself() -> None:
    program = BAD_DECODER.replace("decoder_process.main()", "decoder_process.ORPHAN_S = 0.1\n"
                                  "decoder_process.main()")  # fmt: skip
    ours, theirs = socket.socketpair()
    with (
        ours,
        theirs,
        subprocess.Popen(
            [sys.executable, "-c", program, str(theirs.fileno())], pass_fds=[theirs.fileno()]
        ) as process,
    ):
        theirs.close()
        send_all(ours, [pack_hello(CHOICE, PlainLimits.of(LIMITS))])
        assert receive(ours, 1) == READY

        send_all(ours, [PLACE.pack(NOWHERE), *pack_request(told("hang"))])
        ours.close()

        try:
            assert process.wait(20) == -signal.SIGALRM
        finally:
            process.kill()
