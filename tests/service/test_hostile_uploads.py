"""A thousand hostile uploads against a real service; `bench.fuzz` sends as many as one likes."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.fuzz import ALLOWED, SETTINGS, Fuzzing, ask, find_fault
from bench.fuzz_bodies import (
    EDITS,
    Edit,
    Seed,
    Upload,
    draw_edits,
    draw_upload,
    form,
    lots,
    make_upload,
    mend_checksums,
    seeds,
    spoil,
)
from bench.fuzz_coverage import TARGETS, write_corpus
from bench.sending import Connection
from bench.serving import FREE, Server, serving
from service.settings import LimitSettings

SEED = 7
BY_LOT, BY_HYPOTHESIS = 600, 400
FOUND = Path(__file__).parent / "hostile"

edits = st.builds(
    Edit,
    kind=st.sampled_from(EDITS),
    at=st.floats(0, 1),
    size=st.integers(1, 300),
    value=st.integers(0, 2**32 - 1),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real service with a decoder process, and an embedder that costs nothing."""
    folder = tmp_path_factory.mktemp("hostile")
    with serving(
        folder / "data", folder / "log", weights=FREE, settings={**SETTINGS, "DECODERS": "1"}
    ) as running:
        yield running


@pytest.fixture(scope="module")
def connection(server: Server) -> Iterator[Connection]:
    connected = Connection(server.port, timeout_s=60)
    yield connected
    connected.close()


def test_hundreds_of_spoiled_uploads_leave_the_service_well(server: Server) -> None:
    fuzzing = Fuzzing(server, lambda number: draw_upload(SEED, number))

    outcome = fuzzing.run(BY_LOT, clients=2)

    assert sum(outcome.statuses.values()) == BY_LOT
    assert outcome.bad == []
    assert [claim for claim in outcome.claims() if not claim.holds] == []
    # The fuzzer is of no use where all is refused at the door, or hardly anything is spoiled.
    assert outcome.stored
    assert outcome.statuses[422] > BY_LOT / 4
    assert set(outcome.statuses) <= ALLOWED


@settings(
    max_examples=BY_HYPOTHESIS,
    deadline=None,
    derandomize=True,
    database=None,
)
@given(
    seed=st.sampled_from(seeds()), edits=st.lists(edits, min_size=1, max_size=4), lot=st.integers(0)
)
def test_whatever_is_made_of_a_good_file_is_read_or_refused(
    connection: Connection, seed: Seed, edits: Sequence[Edit], lot: int
) -> None:
    """Found by hypothesis, so that what fails is small."""
    upload = make_upload(seed, edits, lots(lot))

    _, _, _, wrong = ask(connection, upload)

    assert wrong == ""


@pytest.mark.parametrize("path", sorted(FOUND.glob("*.http")), ids=lambda path: path.stem)
def test_what_once_broke_the_service_is_refused(connection: Connection, path: Path) -> None:
    """Requests that `bench.fuzz` found, as they were sent."""
    status, headers, body = connection.ask(path.read_bytes())

    assert find_fault(status, headers, body) == ""
    assert status >= 400


def test_the_service_is_still_ready(server: Server) -> None:
    assert httpx.get(f"http://127.0.0.1:{server.port}/readyz", timeout=30).status_code == 200


@pytest.mark.parametrize("seed", seeds(), ids=lambda seed: seed.name)
def test_the_files_that_are_spoiled_are_good(connection: Connection, seed: Seed) -> None:
    body = form([(seed.field, "file", seed.content)])
    upload = make_upload(seed, [], lots(0))

    status, _, answer = connection.ask(Upload("/embed", upload.content_type, body, "").request())

    assert status == 200, answer


def test_a_number_says_which_request_it_was() -> None:
    again = [draw_upload(SEED, number) for number in range(20)]

    assert [draw_upload(SEED, number) for number in range(20)] == again
    assert len({upload.body for upload in again}) == 20
    assert draw_upload(SEED + 1, 0) != again[0]


@pytest.mark.parametrize("kind", EDITS)
def test_every_way_to_spoil_spoils(kind: str) -> None:
    content = seeds()[5].content
    rng = lots(0)

    spoiled = {
        spoil(content, [Edit(kind, rng.random(), 4, rng.getrandbits(32))]) for _ in range(20)
    }

    assert len(spoiled - {content}) > 10


def test_a_spoiled_png_gets_right_checksums() -> None:
    """Else every change would be found out by the checksum, and nothing behind it tried."""
    png = next(seed.content for seed in seeds() if seed.name == "png")
    at = png.index(b"IHDR") + 4

    mended = mend_checksums(png[:at] + b"\0\0\0\x20" + png[at + 4 :])

    assert mend_checksums(png) == png
    assert mended[at + 13 : at + 17] != png[at + 13 : at + 17]


def test_edits_are_few_and_mostly_small() -> None:
    drawn = [edit for number in range(200) for edit in draw_edits(lots(number))]

    assert {edit.kind for edit in drawn} == set(EDITS)
    assert sorted(edit.size for edit in drawn)[len(drawn) // 2] <= 4


@pytest.mark.parametrize("target", TARGETS)
def test_what_coverage_leads_begins_with_good_files(tmp_path: Path, target: str) -> None:
    write_corpus(tmp_path / "corpus", target)

    files = sorted((tmp_path / "corpus").iterdir())
    assert len(files) == len(seeds())
    for file in files:
        TARGETS[target](file.read_bytes())
    TARGETS[target](b"")


def test_a_limit_on_pixels_holds_for_what_is_fuzzed() -> None:
    """A bomb must not be what the memory of the test machine is measured by."""
    limits = LimitSettings()

    assert int(SETTINGS["LIMITS__FRAME_PIXELS"]) < limits.frame_pixels
