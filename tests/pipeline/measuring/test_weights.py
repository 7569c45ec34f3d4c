"""From pieces on disk to weights: assembled, hashed, read by rows when large; and the memory use."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save_file

from kasa_cli.checkpoint import matrix as matrices
from kasa_cli.checkpoint import safetensors_file
from kasa_cli.checkpoint.layout import Checkpoint, open_checkpoint
from kasa_cli.checkpoint.matrix import Matrix, Orientation, Piece
from kasa_cli.checkpoint.safetensors_file import Reader
from kasa_cli.checkpoint.safetensors_writer import filling, lay_out
from kasa_cli.errors import IntegrityError, InvalidInput
from kasa_cli.linalg.frame import StreamedWeight
from kasa_cli.pipeline.measuring import weights
from kasa_cli.pipeline.measuring.facts import HashedMatrix
from tests.builders.checkpoints import save_plain
from tests.builders.matrices import FLOATS, gaussian, same_bytes
from tests.builders.runs import environment

CPU = torch.device("cpu")


def opened(folder, **tensors: torch.Tensor) -> Checkpoint:
    return open_checkpoint(save_plain(tensors, folder))


@dataclass(frozen=True)
class Asked:
    """A matrix by its pieces; a checkpoint then gives their sizes."""

    name: str
    pieces: tuple[Piece, ...]
    orientation: Orientation = Orientation.AS_READ

    def within(self, checkpoint: Checkpoint) -> Matrix:
        return Matrix.of(checkpoint.tensors, self.name, self.pieces, self.orientation)


def whole(name: str = "w", *, is_transposed: bool = False) -> Asked:
    return Asked(name, (Piece(name),), Orientation.of(is_transposed))


def weigh(checkpoint: Checkpoint, matrix: Asked, device: torch.device) -> HashedMatrix:
    return weights.weigh(checkpoint, matrix.within(checkpoint), device)


def read_pieces(checkpoint: Checkpoint, pieces: Sequence[Piece]) -> torch.Tensor:
    return Asked("", tuple(pieces)).within(checkpoint).stored(checkpoint)


def content(checkpoint: Checkpoint, matrix: Asked) -> str:
    return weigh(checkpoint, matrix, CPU).content


@pytest.fixture
def streaming(monkeypatch):
    monkeypatch.setattr(matrices, "STREAMED_BYTES", 100)
    return monkeypatch


# --- what a weight is ---


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("is_transposed", [False, True], ids=["out, in", "in, out"])
def test_a_weight_is_read_as_it_is_stored_and_turned_to_out_in(tmp_path, dtype, is_transposed):
    W = gaussian(9, 5, dtype)
    weight = weigh(opened(tmp_path, w=W), whole(is_transposed=is_transposed), CPU)
    right = W.T if is_transposed else W
    read = weight.read()
    assert isinstance(read, torch.Tensor)
    assert same_bytes(read, right)
    assert weight.shape == right.shape
    assert (weight.name, weight.dtype) == (
        "w",
        {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype],
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_large_tall_weight_is_read_by_rows_and_hashed_alike(tmp_path, dtype, monkeypatch):
    W = gaussian(60, 5, dtype)
    checkpoint = opened(tmp_path, w=W, other=gaussian(7, 7))
    held = weigh(checkpoint, whole(), CPU)
    monkeypatch.setattr(matrices, "STREAMED_BYTES", 100)
    read = weigh(checkpoint, whole(), CPU)
    assert (read.content, read.shape, read.dtype) == (held.content, held.shape, held.dtype)
    rows = read.read()
    assert isinstance(rows, StreamedWeight)
    assert rows.shape == (60, 5)
    assert same_bytes(torch.cat([rows.read(n, min(n + 7, 60)) for n in range(0, 60, 7)]), W)
    assert same_bytes(torch.cat(list(rows.blocks())), W)


HELD = {
    "wide": ((5, 60), whole()),
    "square": ((20, 20), whole()),
    "in, out": ((60, 5), whole(is_transposed=True)),
    "an expert": ((3, 60, 5), Asked("w[1]", (Piece("w", 1),))),
    "stacked": ((60, 5), Asked("w", (Piece("w"), Piece("w")))),
}


@pytest.mark.parametrize(("shape", "matrix"), HELD.values(), ids=HELD)
def test_what_cannot_be_read_by_rows_is_held(shape, matrix, tmp_path, streaming):
    checkpoint = opened(tmp_path, w=torch.randn(shape))
    assert isinstance(weigh(checkpoint, matrix, CPU).read(), torch.Tensor)


def test_only_above_the_limit_is_a_weight_read_by_rows(tmp_path, monkeypatch):
    checkpoint = opened(tmp_path, w=torch.randn(60, 5))
    for limit, kind in ((60 * 5 * 4, torch.Tensor), (60 * 5 * 4 - 1, StreamedWeight)):
        monkeypatch.setattr(matrices, "STREAMED_BYTES", limit)
        assert isinstance(weigh(checkpoint, whole(), CPU).read(), kind)


# --- its key in the store ---


@pytest.mark.parametrize("limit", [1, 1 << 30], ids=["by rows", "held"])
def test_the_content_changes_with_dtype_shape_bytes_and_orientation(tmp_path, limit, monkeypatch):
    monkeypatch.setattr(matrices, "STREAMED_BYTES", limit)
    W = torch.arange(24, dtype=torch.float32).reshape(12, 2)
    flipped = W.clone()
    flipped[11, 1] = -flipped[11, 1]
    variants = {
        "w": W,
        "bytes": flipped,
        "shape": W.reshape(8, 3).clone(),
        "dtype": W.to(torch.float16),
        "other dtype, same bytes": W.to(torch.float16).view(torch.bfloat16).clone(),
        "view": W.view(torch.bfloat16).reshape(24, 2).clone(),
    }
    checkpoint = opened(tmp_path, **variants)
    found = [content(checkpoint, whole(name)) for name in variants]
    found.append(content(checkpoint, whole("w", is_transposed=True)))
    assert len({*found}) == len(found) == 7
    assert all(len(one) == 64 for one in found)


def test_the_content_does_not_change_with_name_file_or_pieces(tmp_path):
    W = gaussian(12, 4, torch.bfloat16)
    one = opened(tmp_path / "one", w=W)
    other = opened(tmp_path / "other", a=W[:5].clone(), b=W[5:].clone(), stack=torch.stack([-W, W]))
    known = content(one, whole())
    assert content(other, Asked("x", (Piece("a"), Piece("b")))) == known
    assert content(other, Asked("y", (Piece("stack", 1),))) == known
    assert content(other, Asked("y", (Piece("stack", 0),))) != known
    assert content(other, Asked("x", (Piece("b"), Piece("a")))) != known


# --- pieces ---


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pieces_are_slices_of_experts_stacked_by_rows(tmp_path, dtype):
    gate, up, fused = gaussian(3, 4, dtype), gaussian(5, 4, dtype, seed=1), torch.randn(6, 2, 4).to(dtype)
    checkpoint = opened(tmp_path, gate=gate, up=up, fused=fused)
    assert same_bytes(checkpoint.tensor("up"), up)
    assert same_bytes(read_pieces(checkpoint, [Piece("gate"), Piece("up")]), torch.cat([gate, up]))
    for expert in range(6):
        assert same_bytes(read_pieces(checkpoint, [Piece("fused", expert)]), fused[expert])
    both = [Piece("fused", 5), Piece("gate"), Piece("fused", 0)]
    assert same_bytes(read_pieces(checkpoint, both), torch.cat([fused[5], gate, fused[0]]))


def test_of_a_stack_of_experts_only_one_is_read(tmp_path, monkeypatch):
    checkpoint = opened(tmp_path, fused=torch.randn(50, 4, 8))
    num_bytes = []
    real = safetensors_file.read_into

    def read_into(file, path, room, offset):
        num_bytes.append(len(room))
        real(file, path, room, offset)

    monkeypatch.setattr(safetensors_file, "read_into", read_into)
    monkeypatch.setattr(Reader, "tensor", None)
    read_pieces(checkpoint, [Piece("fused", 7)])
    assert num_bytes == [4 * 8 * 4]


PLACES = {
    "whole": Asked("w", (Piece("w"),)),
    "an expert": Asked("w", (Piece("fused", 2),)),
    "stacked": Asked("w", (Piece("top"), Piece("rest"))),
}


@pytest.mark.parametrize("entries", [1, 4, 31, 10_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_of_rows_are_the_same_wherever_the_pieces_lie(tmp_path, dtype, entries, monkeypatch):
    monkeypatch.setattr(matrices, "BLOCK_ENTRIES", entries)
    W = gaussian(23, 4, dtype)
    stack = torch.stack([-W, 2 * W, W])
    checkpoint = opened(tmp_path, w=W, fused=stack, top=W[:10].clone(), rest=W[10:].clone())
    found = [list(matrix.within(checkpoint).row_blocks(checkpoint)) for matrix in PLACES.values()]
    step = max(1, entries // 4)
    for blocks in found:
        assert same_bytes(torch.cat(blocks), W)
        assert [len(block) for block in blocks] == [min(step, 23 - n) for n in range(0, 23, step)]


# --- a file that changes ---


def answers(checkpoint: Checkpoint, matrix: Asked):
    """Every way to read the bytes of a weight."""
    yield lambda: weigh(checkpoint, matrix, CPU)
    yield lambda: read_pieces(checkpoint, matrix.pieces)
    yield lambda: list(matrix.within(checkpoint).row_blocks(checkpoint))


@pytest.mark.parametrize("matrix", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("limit", [1, 1 << 30], ids=["by rows", "held"])
def test_a_file_that_changes_under_it_is_an_integrity_error(tmp_path, matrix, limit, monkeypatch):
    monkeypatch.setattr(matrices, "STREAMED_BYTES", limit)
    W = gaussian(23, 4)
    tensors = {"w": W, "fused": torch.stack([W, W, W]), "top": W[:10].clone(), "rest": W[10:].clone()}
    checkpoint = opened(tmp_path, **tensors)
    save_file(tensors, tmp_path / "next")
    (tmp_path / "next").replace(tmp_path / "model.safetensors")
    for answer in answers(checkpoint, matrix):
        with pytest.raises(IntegrityError, match="changed since it was planned with"):
            answer()


def test_a_file_that_changes_between_two_panels_is_an_integrity_error(tmp_path, streaming):
    checkpoint = opened(tmp_path, w=gaussian(60, 5))
    rows = weigh(checkpoint, whole(), CPU).read()
    rows.read(0, 10)
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    with pytest.raises(IntegrityError, match="changed since it was planned with"):
        rows.read(10, 20)


def test_a_file_that_is_cut_short_between_two_panels_is_invalid(tmp_path, streaming):
    checkpoint = opened(tmp_path, w=gaussian(60, 5))
    rows = weigh(checkpoint, whole(), CPU).read()
    file = tmp_path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 8)
    with pytest.raises(InvalidInput, match="truncated"):
        rows.read(10, 20)


# --- memory ---

COLUMNS = 1024
ONE_AFTER_THE_OTHER = """
import json, sys
from kasa_cli.cli import app as cli
from kasa_cli.linalg import frame
from kasa_cli.checkpoint import matrix

matrix.STREAMED_BYTES = frame.BLOCK_ENTRIES = 1 << 20
options = ["--target", "embed_tokens", "--no-store", "--json", "--quiet", "--workers", "1"]
for model in sys.argv[1:]:
    code = cli._guarded(["inspect", "spectrum", model, *options])
    # not ru_maxrss, which a child takes over from the process that it was forked from
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(json.dumps([int(code), int(peak.split()[1])]), file=sys.stderr)
"""


def embedding(folder, rows: int):
    """A checkpoint of an unknown family whose one tensor is an embedding in bfloat16."""
    name, block = "model.embed_tokens.weight", gaussian(rows // 8, COLUMNS, torch.bfloat16)
    folder.mkdir()
    with filling(folder / "model.safetensors", lay_out([(name, "BF16", (rows, COLUMNS))])) as file:
        file.put(name, torch.cat([block] * 8))
    (folder / "config.json").write_text('{"model_type": "none-of-these"}')
    return folder


def test_the_memory_of_a_measurement_does_not_grow_with_the_weight(tmp_path):
    rows = (24_000, 48_000)
    models = [embedding(tmp_path / str(n), n) for n in rows]
    # glibc adapts its thresholds to earlier frees and then keeps freed memory: megabytes at random
    exact = environment(MALLOC_MMAP_THRESHOLD_="131072", MALLOC_TRIM_THRESHOLD_="131072")
    done = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_THE_OTHER, *map(str, models)],
        env=exact,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    codes, peaks = zip(*map(json.loads, done.stderr.splitlines()), strict=True)
    assert codes == (0, 0)
    growth = (peaks[1] - peaks[0]) << 10
    weight, vectors = (rows[1] - rows[0]) * COLUMNS * 2, (rows[1] - rows[0]) * 32 * 8
    assert growth < 4 * vectors < weight  # thin and in float64: the vectors of the long side
