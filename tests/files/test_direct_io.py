"""Ranges of a file written by direct I/O: every byte is in its place, at any alignment and number of threads."""

import errno
import fcntl
import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from kasa_cli.errors import IntegrityError, ResourceError
from kasa_cli.files import direct_io
from kasa_cli.files.direct_io import BLOCK, Lanes, OpenFile, opened_directly
from kasa_cli.files.durable import new_file

ROOM = 4 * BLOCK


@pytest.fixture(autouse=True)
def little_room(monkeypatch):
    monkeypatch.setattr(direct_io, "ROOM", ROOM)


@pytest.fixture(params=["past the cache", "the usual way", "refused late"])
def way(request, monkeypatch):
    """A file system with direct I/O, one without, and one that refuses only the first write."""
    if request.param == "the usual way":
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    if request.param == "refused late":

        def no_direct(descriptor, data, offset, pwrite=os.pwrite):
            refuse_direct(descriptor)
            return pwrite(descriptor, data, offset)

        def no_direct_read(descriptor, rooms, offset, preadv=os.preadv):
            refuse_direct(descriptor)
            return preadv(descriptor, rooms, offset)

        monkeypatch.setattr(os, "pwrite", no_direct)
        monkeypatch.setattr(os, "preadv", no_direct_read)
    return request.param


def refuse_direct(descriptor):
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
        raise OSError(errno.EINVAL, "no")


def is_direct(folder):
    with (folder / "probe").open("wb+") as file, opened_directly(file.fileno()) as opened:
        return opened.direct is not None


def pieces(data, size):
    """Pieces in one reused buffer, as a reader yields them."""
    room = bytearray(size)
    for start in range(0, len(data), size):
        piece = data[start : start + size]
        room[: len(piece)] = piece
        yield memoryview(room)[: len(piece)]


def write(path, content, stretches, size, workers=1):
    lanes = Lanes()
    with new_file(path, len(content)) as descriptor, opened_directly(descriptor) as opened:

        def one(bounds):
            with lanes.stretch(opened, *bounds, "x") as out:
                for piece in pieces(content[slice(*bounds)], size):
                    out.put(piece)
            assert out.at == bounds[1]

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(one, stretches))
    return lanes


CUTS = {
    "one stretch, whole blocks": [8 * BLOCK],
    "a header before": [123, 123 + 9 * BLOCK],
    "less than a room": [5, ROOM - 7],
    "many": [0, 8, 8 + ROOM, 3 * ROOM - 1, 3 * ROOM, 7 * ROOM + 1, 11 * ROOM + BLOCK - 1, 11 * ROOM + BLOCK],
    "rooms and a bit": [BLOCK, BLOCK + 3 * ROOM + 17, BLOCK + 6 * ROOM + 19],
    "nothing": [64, 64, 64 + 2 * ROOM],
}


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("size", [1000, BLOCK, ROOM, 3 * ROOM + 5])
@pytest.mark.parametrize("workers", [1, 3])
def test_every_byte_is_in_its_place(cuts, size, workers, way, tmp_path):
    content = os.urandom(cuts[-1])
    bounds = list(zip([0, *cuts], cuts, strict=False))
    lanes = write(tmp_path / "file", content, bounds[::-1], size, workers)
    assert (tmp_path / "file").read_bytes() == content
    assert 1 <= len(lanes.idle) <= workers


def test_whole_blocks_do_go_past_the_cache(tmp_path, monkeypatch):
    if not is_direct(tmp_path):
        pytest.skip("this filesystem has no direct access")
    written = []

    def seen(descriptor, data, offset, pwrite=os.pwrite):
        written.append((threading.current_thread().name.startswith("kasa-disk"), offset, len(data)))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", seen)
    content = os.urandom(5 + 2 * ROOM + BLOCK)
    write(tmp_path / "file", content, [(0, 5), (5, len(content))], BLOCK)
    assert [at[1:] for at in written if at[0]] == [(BLOCK, ROOM), (BLOCK + ROOM, ROOM)]
    assert sorted(at[1:] for at in written if not at[0]) == [(0, 5), (5, BLOCK - 5), (2 * ROOM + BLOCK, 5)]


@pytest.mark.parametrize("place", [3, BLOCK + 9, ROOM + BLOCK, 3 * ROOM - 1])
def test_a_byte_that_comes_back_other_than_written_is_found(place, way, tmp_path, monkeypatch):
    def slip(descriptor, data, offset, pwrite=direct_io.pwrite_all):
        bad = mmap.mmap(-1, len(data))  # at a page boundary, as direct I/O requires
        bad[:] = bytes(data)
        if offset <= place < offset + len(data):
            bad[place - offset] ^= 1
        pwrite(descriptor, memoryview(bad), offset)

    monkeypatch.setattr(direct_io, "pwrite_all", slip)
    with pytest.raises(IntegrityError, match="the bytes read back differ from those written: x"):
        write(tmp_path / "file", os.urandom(3 * ROOM), [(0, 3 * ROOM)], BLOCK)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_a_full_disk_is_told_and_leaves_nothing(calls, way, tmp_path, monkeypatch):
    left = [calls]

    def full(descriptor, data, offset, pwrite=direct_io.pwrite_all):
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        pwrite(descriptor, data, offset)

    monkeypatch.setattr(direct_io, "pwrite_all", full)
    with pytest.raises(ResourceError, match="No space left"):
        write(tmp_path / "file", os.urandom(4 * ROOM), [(0, 4 * ROOM)], BLOCK)
    assert not list(tmp_path.iterdir())


def test_nothing_is_under_way_when_a_stretch_ends_in_an_error(tmp_path):
    """The file is closed next, and its descriptor may soon belong to another file."""
    lanes = Lanes()
    with (tmp_path / "file").open("wb+") as file:
        file.truncate(4 * ROOM)
        with opened_directly(file.fileno()) as opened:
            with pytest.raises(ZeroDivisionError), lanes.stretch(opened, 0, 4 * ROOM, "x") as out:
                out.put(memoryview(bytes(ROOM)))
                raise ZeroDivisionError
            assert out._pending is None and len(lanes.idle) == 1
        if opened.direct is not None:
            with pytest.raises(OSError, match="Bad file"):
                os.fstat(opened.direct)


def test_a_stretch_reads_what_lies_around_it_never(tmp_path):
    """Other threads write the neighbouring ranges at the same time; their bytes must not change."""
    path = tmp_path / "file"
    before = os.urandom(4 * ROOM)
    path.write_bytes(before)
    with path.open("rb+") as file, opened_directly(file.fileno()) as opened:
        middle = os.urandom(2 * ROOM)
        with Lanes().stretch(opened, ROOM + 7, 3 * ROOM + 7, "x") as out:
            out.put(memoryview(middle))
    assert path.read_bytes() == before[: ROOM + 7] + middle + before[3 * ROOM + 7 :]


def test_without_direct_access_there_is_only_the_usual_way(tmp_path):
    with (tmp_path / "file").open("wb+") as file:
        lanes = Lanes()
        with lanes.stretch(OpenFile(file.fileno(), None), 0, 3 * ROOM, "x") as out:
            out.put(memoryview(bytes(3 * ROOM)))
        assert "thread" not in vars(lanes.idle[0])
