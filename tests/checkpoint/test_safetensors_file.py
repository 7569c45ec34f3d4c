"""One safetensors file: malformed files are refused, valid files are read, and a change during a run is noticed."""

import os
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from safetensors import safe_open

from kasa_cli.checkpoint.dtypes import BITS
from kasa_cli.checkpoint.safetensors_file import Reader, read_header
from kasa_cli.errors import InvalidInput, KasaError, UnsafeInput
from tests.builders.faults import st, tensor
from tests.builders.runs import ROOT

ONE = {"a": tensor(0, 16)}
BODY = b"\0" * 16


def raw(text: str) -> bytes:
    return text.encode()


def entries(*parts: str) -> bytes:
    return raw("{" + ",".join(parts) + "}")


A_2x2 = '"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}'
A_4 = '"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'
B_LATER = '"a":{"dtype":"F32","shape":[2,2],"data_offsets":[16,32]}'


def with_metadata(text: str) -> bytes:
    return entries(f'"__metadata__":{text}', A_2x2)


def polyglot(path: Path) -> None:
    st(path, ONE, BODY)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("payload.py", "print()")


# id: (build, expected error, a word of the message)
INVALID = {
    "A1 empty": (lambda p: p.write_bytes(b""), "truncated"),
    "A1 seven bytes": (lambda p: p.write_bytes(b"\0" * 7), "truncated"),
    "A2 2**63": (lambda p: st(p, ONE, BODY, n=2**63), "header too large"),
    "A2 2**64-1": (lambda p: st(p, ONE, BODY, n=2**64 - 1), "header too large"),
    "A2 one over": (lambda p: st(p, ONE, BODY, n=100_000_001), "header too large"),
    "A3 longer than the file": (
        lambda p: st(p, ONE, BODY, n=1000),
        "truncated: expected at least 1008 bytes",
    ),
    "A4 body short": (lambda p: st(p, ONE, BODY[:-1]), "truncated: expected 89 bytes, have 88"),
    "A4 body long": (lambda p: st(p, ONE, BODY + b"x"), "trailing bytes"),
    "A5 overlap": (lambda p: st(p, {**ONE, "b": tensor(8, 24)}, b"\0" * 24), "overlaps"),
    "A5 same range": (lambda p: st(p, {**ONE, "b": tensor(0, 16)}, BODY), "overlaps"),
    "A6 hole": (lambda p: st(p, {**ONE, "b": tensor(20, 36)}, b"\0" * 36), "hole"),
    "A6 hole at the start": (lambda p: st(p, {"a": tensor(4, 20)}, b"\0" * 20), "hole"),
    "A7 negative": (lambda p: st(p, {"a": tensor(-4, 12)}, BODY), "impossible"),
    "A7 backwards": (lambda p: st(p, {"a": tensor(16, 0)}, BODY), "impossible"),
    "A8 shape": (lambda p: st(p, {"a": tensor(0, 16, (3, 2))}, BODY), "does not fit"),
    "A8 product overflows": (lambda p: st(p, {"a": tensor(0, 16, (2**40, 2**40))}, BODY), "does not fit"),
    "A8 wraps to the right size": (
        lambda p: st(p, {"a": tensor(0, 16, (2**32, 2**32 + 1))}, BODY),
        "does not fit",
    ),
    "A9 duplicate": (lambda p: st(p, entries(A_2x2, B_LATER), b"\0" * 32), "duplicate name 'a'"),
    "A10 same bytes": (lambda p: st(p, entries(A_2x2, A_4), BODY), "duplicate name 'a'"),
    "A11 metadata twice": (lambda p: st(p, with_metadata('{"k":"1","k":"2"}'), BODY), "duplicate name 'k'"),
    "A11 two metadata": (
        lambda p: st(p, entries('"__metadata__":{}', '"__metadata__":{}', A_2x2), BODY),
        "dupl",
    ),
    "A12 leading space": (lambda p: st(p, b" " + entries(A_2x2), BODY), "does not begin with"),
    "A13 dtype": (lambda p: st(p, {"a": tensor(0, 16, dtype="F33")}, BODY), "unknown dtype 'F33'"),
    "A13 dtype is a list": (lambda p: st(p, {"a": {**ONE["a"], "dtype": []}}, BODY), "unknown dtype"),
    "A13 metadata number": (lambda p: st(p, with_metadata('{"k":1}'), BODY), "__metadata__"),
    "A13 metadata null": (lambda p: st(p, with_metadata("null"), BODY), "__metadata__"),
    "A13 bad UTF-8": (lambda p: st(p, b'{"\xff":1}'), "invalid JSON"),
    "A13 list": (lambda p: st(p, b"[]"), "does not begin with"),
    "A13 brackets": (lambda p: st(p, b"[" * 200_000), "does not begin with"),
    "A13 nested": (lambda p: st(p, b'{"a":' + b"[" * 200_000), "nested too deep"),
    "A13 not JSON": (lambda p: st(p, b"{]"), "invalid JSON"),
    "entry is a string": (lambda p: st(p, {"a": "dtype"}), "lacks dtype"),
    "entry is a list": (lambda p: st(p, {"a": []}), "lacks dtype"),
    "entry lacks shape": (
        lambda p: st(p, {"a": {"dtype": "F32", "data_offsets": [0, 16]}}, BODY),
        "lacks dtype",
    ),
    "true is no side": (lambda p: st(p, {"a": {**ONE["a"], "shape": [True, 4]}}, BODY), "impossible"),
    "half a side": (lambda p: st(p, {"a": {**ONE["a"], "shape": [0.5, 8]}}, BODY), "impossible"),
    "three offsets": (lambda p: st(p, {"a": {**ONE["a"], "data_offsets": [0, 8, 16]}}, BODY), "impossible"),
    "number of 5000 digits": (lambda p: st(p, raw('{"a":' + "9" * 5000 + "}")), "invalid JSON"),
    "A15 zero times 2**62": (lambda p: st(p, {"a": tensor(0, 0, (0, 2**62))}), "does not fit"),
    "65 dimensions": (lambda p: st(p, {"a": tensor(0, 4, (1,) * 65)}, b"\0" * 4), "does not fit"),
    "A16 ten million items": (lambda p: st(p, b'{"a":[' + b"[]," * 5_000_000 + b"0]}"), "too large"),
    "A17 F4 of odd length": (lambda p: st(p, {"a": tensor(0, 2, (3,), "F4")}, b"\0\0"), "does not fit"),
    "A17 BF16 on F32 bytes": (lambda p: st(p, {"a": tensor(0, 16, dtype="BF16")}, BODY), "does not fit"),
    "A22 zip appended": (polyglot, "trailing bytes"),
    "A22 PDF before": (
        lambda p: p.write_bytes(b"%PDF-1.7" + bytes(st(p, ONE, BODY).read_bytes())),
        "too large",
    ),
    "C3 pickle": (lambda p: p.write_bytes(b"\x80\x04\x95" + b"x" * 100), "header too large"),
    "LFS pointer": (
        lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        "Git LFS pointer",
    ),
    "absent": (lambda p: None, "no such file"),
}


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


UNSAFE = {
    "A14 empty name": (lambda p: st(p, {"": tensor(0, 16)}, BODY), "empty or not printable"),
    "A14 NUL": (lambda p: st(p, {"a\0b": tensor(0, 16)}, BODY), "not printable"),
    "A14 escape codes": (lambda p: st(p, {"\x1b]52;c;cm0=\x07": tensor(0, 16)}, BODY), "not printable"),
    "A14 right-to-left": (lambda p: st(p, {"\u202egnp": tensor(0, 16)}, BODY), "not printable"),
    "A14 lone surrogate": (lambda p: st(p, {"\ud800": tensor(0, 16)}, BODY), "not printable"),
    "A14 1 MB": (lambda p: st(p, {"n" * 1_000_000: tensor(0, 16)}, BODY), "4096 bytes or longer"),
    "A14 4 KB": (lambda p: st(p, {"é" * 2048: tensor(0, 16)}, BODY), "4096 bytes or longer"),
    "A23 FIFO": (os.mkfifo, "not a regular file"),
    "A23 directory": (lambda p: p.mkdir(), "not a regular file"),
    "A23 socket": (bind, "not a regular file"),
    "A23 device": (lambda p: p.symlink_to("/dev/zero"), "not a regular file"),
}
CASES = [(name, InvalidInput, *case) for name, case in INVALID.items()]
CASES += [(name, UnsafeInput, *case) for name, case in UNSAFE.items()]


@pytest.mark.parametrize(
    ("kind", "build", "word"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_a_broken_file_is_refused_by_name_and_reason(tmp_path, kind, build, word):
    path = tmp_path / "x.safetensors"
    build(path)
    start = time.monotonic()
    with pytest.raises(KasaError) as caught:
        read_header(path)
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert word in message and str(path) in message
    assert message.isprintable() and len(message) < 1000
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", ["a b", "../../x", "/etc/passwd", "层.权重", "n" * 4095])
def test_a_printable_name_is_data_whatever_it_looks_like(tmp_path, name):
    container = read_header(st(tmp_path / "x", {name: tensor(0, 16)}, BODY))
    assert list(container.tensors) == [name]


def test_names_that_unicode_calls_equal_stay_two(tmp_path):
    header = {"\u00e9": tensor(0, 16), "e\u0301": tensor(16, 32)}
    assert len(read_header(st(tmp_path / "x", header, b"\0" * 32)).tensors) == 2


def test_the_header_is_told_as_it_is(tmp_path):
    header = {"__metadata__": {"format": "pt"}, "b": tensor(16, 24, (4,), "BF16"), "a": tensor(0, 16)}
    path = st(tmp_path / "x", header, b"\0" * 24)
    container = read_header(path)
    assert list(container.tensors) == ["a", "b"]
    assert container.metadata == {"format": "pt"}
    entry = container.tensors["b"]
    assert (entry.dtype, entry.shape, entry.num_bytes) == ("BF16", (4,), 8)
    assert entry.end == path.stat().st_size == container.identity.size
    assert container.data_start == path.stat().st_size - 24


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0, 3)])
def test_tensors_without_elements_are_fine(tmp_path, shape):
    header = {"none": tensor(0, 0, shape), "a": tensor(0, 16), "last": tensor(16, 16, shape)}
    container = read_header(st(tmp_path / "x", header, BODY))
    assert container.tensors["none"].num_bytes == 0
    with Reader(container) as reader:
        assert reader.tensor("none").shape == shape
        assert list(reader.chunks("last")) == []


def test_a_scalar_and_no_tensor_at_all_are_fine(tmp_path):
    assert read_header(st(tmp_path / "x", {"s": tensor(0, 4, ())}, b"\0" * 4)).tensors["s"].shape == ()
    assert read_header(st(tmp_path / "x", {})).tensors == {}


def test_unknown_fields_are_noted(tmp_path):
    container = read_header(st(tmp_path / "x", {"a": {**ONE["a"], "colour": "red"}}, BODY))
    assert container.unknown_fields == ("colour",)


@pytest.mark.parametrize("dtype", BITS)
def test_every_dtype_of_the_format_has_the_width_the_library_gives_it(tmp_path, dtype):
    size = BITS[dtype]  # bytes of eight elements
    path = st(tmp_path / "x", {"a": tensor(0, size, (8,), dtype)}, bytes(range(size)))
    with safe_open(path, framework="pt", backend="pread") as library:
        assert list(library.keys()) == ["a"]
    with Reader(read_header(path)) as reader:
        assert b"".join(bytes(chunk) for chunk in reader.chunks("a", 5)) == bytes(range(size))


def test_a_hundred_thousand_tensors_take_seconds(tmp_path):
    header = {f"layer.{i}.w": tensor(4 * i, 4 * i + 4, (1,)) for i in range(100_000)}
    path = st(tmp_path / "x", header, sparse=400_000)
    start = time.monotonic()
    assert len(read_header(path).tensors) == 100_000
    assert time.monotonic() - start < 30


MEASURED = """
import sys
from pathlib import Path
from kasa_cli.checkpoint.safetensors_file import Reader, read_header
from kasa_cli.errors import InvalidInput
try:
    with Reader(read_header(Path(sys.argv[1]))) as reader:
        print(float(reader.tensor("small").sum()), len(next(reader.chunks("big"))))
except InvalidInput as error:
    print("refused")
# not ru_maxrss, which a child takes over from the process that it was forked from
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) >> 10)
"""


def measured(path: Path) -> tuple[str, int]:
    """The outcome of reading a file in a new process, and the memory it takes in MiB."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MEASURED, str(path)]
    child = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True)
    outcome, megabytes = child.stdout.splitlines()
    return outcome, int(megabytes)


def test_a_shard_larger_than_memory_is_read_by_the_tensor(tmp_path):
    size = 40 << 30
    header = {"big": tensor(0, size, (size,), "U8"), "small": tensor(size, size + 16)}
    outcome, megabytes = measured(st(tmp_path / "x", header, sparse=size + 16))
    assert (outcome, megabytes < 1024) == (f"0.0 {1 << 24}", True)


def test_a_header_of_a_hundred_megabytes_stays_under_a_gigabyte(tmp_path):
    one = b'"%07d":{"dtype":"I8","shape":[0],"data_offsets":[0,0]},'
    path = st(tmp_path / "x", b"{" + b"".join(one % i for i in range(1_700_000))[:-1] + b"}")
    assert 95_000_000 < path.stat().st_size < 100_000_000
    outcome, megabytes = measured(path)
    assert (outcome, megabytes < 1024) == ("refused", True)
