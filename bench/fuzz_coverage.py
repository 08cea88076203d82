"""Let coverage lead the fuzzer, below HTTP: the multipart reader, and all that decodes an upload.

    .venv/bin/pip install --constraint constraints.txt '.[fuzz]'      # atheris, on Linux
    .venv/bin/python -m bench.fuzz_coverage uploads corpus -max_total_time=600 -max_len=65536
    .venv/bin/python -m bench.fuzz_coverage multipart corpus -max_total_time=600

The first word says what is fuzzed, what follows goes to libFuzzer: a folder that keeps what led to
new code, and options. An empty folder gets the good files of `bench.fuzz_bodies` first. What is
refused is fine; any other exception ends the run, and libFuzzer writes the input down.

Python code is watched, ours and that of libraries; of C code (Pillow's decoders, FFmpeg) crashes
and memory alone are seen. `bench.fuzz` sends the same kinds of files to a real service.
"""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from bench.fuzz_bodies import BOUNDARY, form, mend_checksums, seeds
from service.errors import ServiceError
from service.limits import FILE_FIELDS
from service.settings import LimitSettings

LIMITS = LimitSettings(frame_pixels=1_000_000)
Target = Callable[[bytes], None]


def fuzz_uploads(data: bytes) -> None:
    """Decode what the first byte says it is."""
    from model.frames import Preprocessing
    from service.uploads import FrameChoice, decode_upload

    if not data:
        return
    field, content = FILE_FIELDS[data[0] % len(FILE_FIELDS)], mend_checksums(data[1:])
    choice = FrameChoice(4, "even", Preprocessing(height=64, width=32))
    try:
        decode_upload({field: [content]}, choice, LIMITS)
    except ServiceError:
        return


def fuzz_multipart(data: bytes) -> None:
    """Read a body in pieces, whose length the first byte gives."""
    from python_multipart.exceptions import FormParserError

    from service.multipart import _FormReader

    if not data:
        return
    length, body = data[0] + 1, data[1:]
    reader = _FormReader(BOUNDARY.encode(), LIMITS, FILE_FIELDS)
    try:
        for at in range(0, len(body), length):
            reader.write(body[at : at + length])
        reader.finish()
    except (ServiceError, FormParserError):
        return


TARGETS: dict[str, Target] = {"uploads": fuzz_uploads, "multipart": fuzz_multipart}


def write_corpus(folder: Path, target: str) -> None:
    """Begin a corpus with good files; one that has begun stays as it is.

    Args:
        folder: Made if missing.
        target: One of `TARGETS`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        return
    for seed in seeds():
        content = bytes([FILE_FIELDS.index(seed.field)]) + seed.content
        if target == "multipart":
            content = b"\xff" + form([("camera", None, b"c1"), (seed.field, "f", seed.content)])
        (folder / seed.name).write_bytes(content)


def main() -> None:
    """Fuzz until libFuzzer has had enough, or has found something."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("corpus", type=Path)
    arguments, rest = parser.parse_known_args()
    try:
        import atheris
    except ImportError:
        raise SystemExit("expected atheris, which the extra `fuzz` brings, got none") from None
    logging.disable()  # what the multipart reader says of each broken body
    watched = ["service", "model", "PIL", "python_multipart", "zipfile"]
    with atheris.instrument_imports(include=watched):
        import PIL.BmpImagePlugin
        import PIL.JpegImagePlugin
        import PIL.PngImagePlugin
        import PIL.WebPImagePlugin  # noqa: F401

        import service.multipart
        import service.uploads
        import service.video  # noqa: F401
    write_corpus(arguments.corpus, arguments.target)
    atheris.Setup([sys.argv[0], str(arguments.corpus), *rest], TARGETS[arguments.target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
