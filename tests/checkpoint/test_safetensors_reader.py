"""Reading tensors of a checked file: the stored values, and an error if the file changes."""

import os

import pytest
import torch
from safetensors.torch import save_file

from kasa_cli.checkpoint.dtypes import BITS
from kasa_cli.checkpoint.safetensors_file import Reader, read_header
from kasa_cli.errors import IntegrityError, InvalidInput
from tests.builders.faults import st, tensor

ONE = {"a": tensor(0, 16)}
BODY = b"\0" * 16


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3"])
def test_a_packed_dtype_is_read_as_bytes_only(tmp_path, dtype):
    path = st(tmp_path / "x", {"a": tensor(0, BITS[dtype], (8,), dtype)}, b"\0" * BITS[dtype])
    with Reader(read_header(path)) as reader, pytest.raises(InvalidInput, match="cannot be read as a tensor"):
        reader.tensor("a")


def test_what_the_library_wrote_is_read_back(tmp_path):
    weights = {
        "w": torch.randn(3, 5, dtype=torch.bfloat16),
        "i": torch.arange(7),
        "b": torch.tensor([True, False]),
    }
    save_file(weights, tmp_path / "x")
    container = read_header(tmp_path / "x")
    with Reader(container) as reader:
        for name, weight in weights.items():
            assert torch.equal(reader.tensor(name), weight)
            stored = b"".join(bytes(chunk) for chunk in reader.chunks(name, size=3))
            assert stored == weight.contiguous().view(torch.uint8).numpy().tobytes()


def test_a_file_replaced_after_the_plan_is_an_integrity_error(tmp_path):
    path = st(tmp_path / "x", ONE, BODY)
    container = read_header(path)
    st(tmp_path / "y", ONE, b"\1" * 16).replace(path)
    with pytest.raises(IntegrityError, match="changed"):
        Reader(container)


def test_a_file_rewritten_in_place_is_an_integrity_error(tmp_path):
    path = st(tmp_path / "x", ONE, BODY)
    with Reader(read_header(path)) as reader:
        os.utime(path, ns=(1, 1))
        with pytest.raises(IntegrityError, match="changed"):
            reader.tensor("a")
        with pytest.raises(IntegrityError, match="changed"):
            list(reader.chunks("a"))


def test_a_file_replaced_before_the_first_tensor_is_an_integrity_error(tmp_path):
    path = st(tmp_path / "x", ONE, BODY)
    with Reader(read_header(path)) as reader:
        st(tmp_path / "y", ONE, b"\1" * 16).replace(path)
        with pytest.raises(IntegrityError, match="changed"):
            reader.tensor("a")


@pytest.mark.parametrize("is_open", [False, True])
def test_a_file_cut_short_while_it_is_read_is_invalid(tmp_path, is_open):
    path = st(tmp_path / "x", {"a": tensor(0, 16), "b": tensor(16, 32)}, b"\0" * 32)
    with Reader(read_header(path)) as reader:
        if is_open:
            reader.tensor("a")
        os.truncate(path, path.stat().st_size - 8)
        with pytest.raises(InvalidInput, match="truncated"):
            reader.tensor("b")
        with pytest.raises(InvalidInput, match="truncated"):
            list(reader.chunks("b"))


def test_a_file_rewritten_while_its_rows_are_read_is_an_integrity_error(tmp_path):
    path = st(tmp_path / "x", ONE, BODY)
    container, room = read_header(path), torch.empty(1, 2)
    name, entry = next(iter(container.tensors.items()))
    assert entry.shape[1:] == (2,)

    def rewritten_between():
        with Reader(container) as reader:
            reader.rows(name, 0, 1, room)
            os.utime(path, ns=(1, 1))
            reader.rows(name, 1, 2, room)

    with pytest.raises(IntegrityError, match="changed since"):
        rewritten_between()


def test_a_file_deleted_after_the_plan_is_invalid(tmp_path):
    path = st(tmp_path / "x", ONE, BODY)
    container = read_header(path)
    path.unlink()
    with pytest.raises(InvalidInput, match="no such file"):
        Reader(container)
