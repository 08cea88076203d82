"""A process that decodes uploads: one at a time, as `service.decoding` sends them over a socket.

It runs as ``python -m service.decoder_process FD [MEMORY]`` and imports no network and no web
framework, so that it starts in a fraction of a second. What travels, in this order, numbers
big-endian:

- once: a `HELLO` of JSON with the choice of frames and the limits; the process answers `READY` when
  it can begin;
- each upload: a `PLACE`, a `REQUEST`, a `FILE` for each of its files, then their bytes;
- each answer: an `ANSWER`, then the bytes it counts: clip, positions, strip, lengths of kept frames
  and these; or a refusal's name, message and pointer as JSON; or the traceback of what should not
  have happened. A clip that is in its place of the memory (`service.clip_memory`) does not travel.

The parent reads nothing but numbers, pixels and text of the lengths that it expects.
"""

import gc
import json
import os
import resource
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, astuple
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.frames import Preprocessing
from service.clip_memory import open_places, stack_into
from service.errors import ServiceError
from service.limits import FILE_FIELDS, PlainLimits
from service.uploads import Decoded, FrameChoice, Keep, decode_upload

Places = NDArray[np.uint8]  # (places, bytes)
HELLO = struct.Struct(">I")  # bytes of JSON
READY = b"\1"
PLACE = struct.Struct(">i")  # of the memory; NOWHERE where the clip is to travel
NOWHERE = -1
REQUEST = struct.Struct(">BI")  # what to keep, of `service.uploads.Keep`; files
FILE = struct.Struct(">BQ")  # which of FILE_FIELDS; bytes
# Kind; frames used and received; bytes of the rest, and of the strip in it; how many frames are
# kept; digest; shortest side, sharpness, brightness.
ANSWER = struct.Struct(">BIIQII32sIdd")
DECODED, PLACED, REFUSED, FAILED = range(4)
POSITION = np.dtype(">u4")
LENGTH = np.dtype(">u8")  # of a kept frame
# What one call may hand to the kernel is bounded (IOV_MAX, 1024).
BUFFERS = 512


def send_all(connection: socket.socket, buffers: Iterable[bytes | memoryview]) -> None:
    """Send buffers one behind the other, without copying them together first."""
    waiting = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
    while waiting:
        drop_sent(waiting, connection.sendmsg(waiting[:BUFFERS]))


def drop_sent(waiting: list[memoryview], sent: int) -> None:
    """Take from the front of buffers what the kernel has taken."""
    done = 0
    while done < len(waiting) and sent >= len(waiting[done]):
        sent -= len(waiting[done])
        done += 1
    del waiting[:done]
    if sent:
        waiting[0] = waiting[0][sent:]


def receive_into(connection: socket.socket, buffer: memoryview) -> None:
    """Fill a buffer.

    Raises:
        EOFError: The other side has gone.
    """
    while buffer:
        received = connection.recv_into(buffer, len(buffer), socket.MSG_WAITALL)
        if not received:
            raise EOFError("expected an answer, got the end of the connection")
        buffer = buffer[received:]


def receive(connection: socket.socket, length: int) -> bytes:
    """Read so many bytes; raises as `receive_into` does."""
    content = connection.recv(length, socket.MSG_WAITALL) if length else b""
    if len(content) < length:  # a signal came between
        rest = bytearray(length - len(content))
        receive_into(connection, memoryview(rest))
        content += rest
    return content


def pack_hello(choice: FrameChoice, limits: PlainLimits) -> bytes:
    """What a decoder is told once."""
    told = json.dumps({"choice": asdict(choice), "limits": asdict(limits)}).encode()
    return HELLO.pack(len(told)) + told


def frame_bytes(choice: FrameChoice) -> int:
    """Of one frame of a clip."""
    return choice.preprocessing.height * choice.preprocessing.width * 3


def place_bytes(choice: FrameChoice) -> int:
    """Of a place in the memory; more frames than are chosen, as "all" may take, have none."""
    return choice.used * frame_bytes(choice)


def _read_hello(connection: socket.socket) -> tuple[FrameChoice, PlainLimits]:
    told = json.loads(receive(connection, *HELLO.unpack(receive(connection, HELLO.size))))
    preprocessing = told["choice"].pop("preprocessing")
    mean, std = (tuple(preprocessing.pop(name)) for name in ("mean", "std"))
    choice = FrameChoice(
        **told["choice"], preprocessing=Preprocessing(**preprocessing, mean=mean, std=std)
    )
    return choice, PlainLimits(**told["limits"])


def pack_request(files: dict[str, list[bytes]], keep: Keep = Keep.NOTHING) -> list[bytes]:
    """What a decoder is sent of an upload."""
    sent = [(at, file) for at, name in enumerate(FILE_FIELDS) for file in files.get(name, ())]
    heads = [FILE.pack(at, len(file)) for at, file in sent]
    start = REQUEST.pack(keep.value, len(sent))
    return [b"".join([start, *heads]), *(file for _, file in sent)]


def _read_request(connection: socket.socket) -> tuple[dict[str, list[bytes]], Keep]:
    kept, count = REQUEST.unpack(receive(connection, REQUEST.size))
    heads = receive(connection, count * FILE.size)
    files: dict[str, list[bytes]] = {}
    for at, length in FILE.iter_unpack(heads):
        files.setdefault(FILE_FIELDS[at], []).append(receive(connection, length))
    return files, Keep(kept)


def _pack_answer(decoded: Decoded, *, placed: bool) -> list[bytes | memoryview]:
    tracklet = decoded.tracklet
    strip = decoded.strip or b""
    positions = np.array(tracklet.positions, dtype=POSITION).tobytes()
    lengths = np.array([len(one) for one in decoded.frames], dtype=LENGTH).tobytes()
    pixels = b"" if placed else tracklet.clip.data.cast("B")
    rest: list[bytes | memoryview] = [pixels, positions, strip, lengths, *decoded.frames]
    length = sum(map(len, rest))
    head = ANSWER.pack(
        PLACED if placed else DECODED,
        len(tracklet.clip),
        tracklet.received,
        length,
        len(strip),
        len(decoded.frames),
        bytes.fromhex(decoded.content),
        *astuple(decoded.quality),
    )
    return [head, *rest]


def _pack_error(kind: int, told: str) -> list[bytes | memoryview]:
    content = told.encode("utf-8", "replace")
    return [ANSWER.pack(kind, 0, 0, len(content), 0, 0, b"", 0, 0.0, 0.0), content]


def _answer(
    files: dict[str, list[bytes]],
    choice: FrameChoice,
    limits: PlainLimits,
    keep: Keep,
    place: NDArray[np.uint8] | None,
) -> list[bytes | memoryview]:
    stack = np.stack if place is None else stack_into(place)
    try:
        decoded = decode_upload(files, choice, limits, keep=keep, stack=stack)
        placed = place is not None and np.may_share_memory(decoded.tracklet.clip, place)
        return _pack_answer(decoded, placed=placed)
    except ServiceError as error:
        refusal = [type(error).__name__, str(error), getattr(error, "pointer", "")]
        return _pack_error(REFUSED, json.dumps(refusal))
    except Exception:  # noqa: BLE001 the parent raises it
        return _pack_error(FAILED, traceback.format_exc())


def _keep_to_itself() -> None:
    """Leave the end to the parent, and everything but the socket alone."""
    # A Ctrl-C or a service manager's SIGTERM means the parent, which finishes what it has begun.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # see `main`
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # people are in its memory
    with suppress(OSError):  # where memory runs out, a decoder is what can be spared
        Path("/proc/self/oom_score_adj").write_text("500", encoding="ascii")
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nothing, standard)
    os.close(nothing)


def main() -> None:
    """Answer uploads until the parent closes the socket, or is gone."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    with connection, suppress(EOFError, ConnectionError):
        choice, limits = _read_hello(connection)
        places = open_places(int(sys.argv[2]), place_bytes(choice)) if sys.argv[2:] else None
        _keep_to_itself()
        gc.freeze()  # what is there now stays, and need not be looked through again
        connection.sendall(READY)
        while True:
            (number,) = PLACE.unpack(receive(connection, PLACE.size))
            place = None if places is None or number == NOWHERE else places[number]
            files, keep = _read_request(connection)
            # The parent ends what takes too long; this is for when the parent is gone itself.
            signal.setitimer(signal.ITIMER_REAL, ORPHAN_S)
            answer = _answer(files, choice, limits, keep, place)
            signal.setitimer(signal.ITIMER_REAL, 0)
            del files
            send_all(connection, answer)
            del answer


# Seconds after which a decoder ends itself, whatever it is at; well above the parent's limit.
ORPHAN_S = 90.0

if __name__ == "__main__":
    main()
