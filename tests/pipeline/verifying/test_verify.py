"""`kasa verify`: a new output passes at every depth; every alteration is found and named, with exit code 5.

Set KASA_ALL_BYTES=1 to alter every byte of an output, one at a time, and not a sample of them.
"""

import json
import os
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from kasa_cli.checkpoint.safetensors_file import read_header
from kasa_cli.errors import ExitCode
from kasa_cli.files.staging import MANIFEST
from kasa_cli.pipeline.truncating.run import ModelLocation, TruncateRequest, truncate
from kasa_cli.pipeline.verifying.run import verify
from tests.builders import tiny_models
from tests.builders.checkpoints import plain_model
from tests.builders.folders import tree_hash
from tests.builders.refusals import refusal
from tests.builders.runs import inside

ALL = bool(os.environ.get("KASA_ALL_BYTES"))
NUM_BYTES = 2500
Q0, Q1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
SHARDS = "base/model-00001-of-00003.safetensors", "base/model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def fresh(model):
    """An output in three shards, with an index."""
    output = model.parent / "fresh"
    truncate(ModelLocation(str(model)), output, TruncateRequest(rank=2, workers=1, max_shard_size="4KB"))
    return output


@pytest.fixture
def output(fresh, tmp_path):
    return shutil.copytree(fresh, tmp_path / "OUT")


# --- valid outputs ---


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize(
    "options",
    [
        TruncateRequest(rank=4),
        TruncateRequest(rank=4, emit=("adapter", "tail")),
        TruncateRequest(rank=4, emit=("base",), rounding="preserve", dtype="bfloat16"),
        TruncateRequest(rank=3, truncation_rank=5, dtype="float16", diag_init="residual", use_rslora=True),
        TruncateRequest(rank=4, truncation_rank=0, max_shard_size="20KB", diag_init="ones"),
        TruncateRequest(rank=2, compat="reference", alpha=3, seed=7),
    ],
    ids=["plain", "no base", "preserve", "residual", "nothing dropped", "reference"],
)
def test_a_fresh_output_passes_at_every_depth(tmp_path_factory, tmp_path, family, options):
    model = tmp_path_factory.getbasetemp() / f"verify-{family}"
    if not model.exists():
        tiny_models.save(family, model)
    truncate(ModelLocation(str(model)), tmp_path / "OUT", options)
    report = verify(tmp_path / "OUT", read_data=True, against=ModelLocation(str(model)))
    assert report.depth == ("manifest", "files", "structure", "data", "base")
    sizes = [path.stat().st_size for path in (tmp_path / "OUT").rglob("*") if path.is_file()]
    assert report.files == len(sizes)
    assert report.bytes_hashed == sum(sizes) - (tmp_path / "OUT" / MANIFEST).stat().st_size
    assert len(report.compared) == report.tensors if "base" not in options.emit else report.compared


@pytest.mark.parametrize("rounding", ["nearest", "preserve"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_another_precision_passes(tmp_path, dtype, rounding):
    model = plain_model(tmp_path / "model", dtype=dtype, dim=24)
    for name in ("auto", "float32"):
        truncate(
            ModelLocation(str(model)), tmp_path / name, TruncateRequest(rank=3, dtype=name, rounding=rounding)
        )
        report = verify(tmp_path / name, read_data=True, against=ModelLocation(str(model)))
        assert max(one["ulps"] for one in report.compared) <= (0.5001 if rounding == "nearest" else 1.0001)


def test_verify_never_writes(model, fresh):
    def state():
        paths = [fresh.parent, *sorted(fresh.parent.rglob("*"))]
        return [(path, os.stat_result(path.lstat())[:7], path.lstat().st_mtime_ns) for path in paths]

    before, trees = state(), tree_hash(fresh.parent)
    verify(fresh, read_data=True, against=ModelLocation(str(model)))
    assert (state(), tree_hash(fresh.parent)) == (before, trees)


def test_an_output_may_be_moved_and_need_not_be_writable(model, output):
    for path in sorted(output.rglob("*"), reverse=True):
        path.chmod(0o500 if path.is_dir() else 0o400)
    moved = output.rename(output.with_name("elsewhere"))
    verify(moved, read_data=True, against=ModelLocation(str(model)))


# --- alterations ---


def tensor_at(path, offset):
    return next((t.name for t in read_header(path).tensors.values() if t.begin <= offset < t.end), None)


def test_every_altered_byte_is_found_and_its_file_and_tensor_are_named(output):
    dice = random.Random(20260)
    places = [
        (path, offset)
        for path in sorted(output.rglob("*"))
        if path.is_file()
        for offset in range(path.stat().st_size)
    ]
    for path, offset in places if ALL else dice.sample(places, NUM_BYTES):
        holder = (
            tensor_at(path, offset) if path.parent.name == "base" and path.suffix == ".safetensors" else ""
        )
        with path.open("r+b", buffering=0) as file:
            byte = os.pread(file.fileno(), 1, offset)
            os.pwrite(file.fileno(), bytes([byte[0] ^ dice.randrange(1, 256)]), offset)
            said = refusal(output, read_data=True, workers=1)
            os.pwrite(file.fileno(), byte, offset)
        assert str(path) in said, (path, offset, said)
        assert not holder or holder in said, (path, offset, said)
    verify(output, read_data=True)


@pytest.mark.parametrize("read_data", [False, True])
def test_headers_and_index_that_changed_are_refused_whatever_the_change(output, read_data):
    """Also alterations that make a file unsafe or invalid for the reader."""
    index = output / "base/model.safetensors.index.json"
    for path, old, new in (
        (output / SHARDS[0], b"_proj", b"\xe2\x80\xaeoj"),
        (output / SHARDS[0], b"_proj", b"_prox"),
        (output / SHARDS[0], b'"F32"', b'"I32"'),
        (output / "adapter/adapter_model.safetensors", b"lora_A", b"lora_\\"),
        (output / "adapter/adapter_model.safetensors", b"lora_diag", b"lora_dia\x01"),
        (output / "tail/adapter_model.safetensors", b"lora_B", b"lora_C"),
        (output / "tail/adapter_model.safetensors", b'"F32"', b'"I32"'),
        (index, b"model-00001", b"../el-00001"),
        (index, b"model-00001", b"model-00002"),
        (index, b"{", b"["),
        (output / "base/config.json", b"{", b"["),
    ):
        whole = path.read_bytes()
        assert old in whole
        path.write_bytes(whole.replace(old, new, 1))
        said = refusal(output, read_data=read_data)
        assert path.name in said or str(path.parent) in said
        assert "\x1b" not in said
        path.write_bytes(whole)


FILES = [
    MANIFEST,
    "README.md",
    *SHARDS,
    "base/config.json",
    "base/tokenizer.json",
    "base/model.safetensors.index.json",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "tail/adapter_model.safetensors",
]


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_cut_longer_or_no_file_is_named(output, name):
    path = output / name
    whole = path.read_bytes()

    def replaced(action):
        path.unlink()
        action()
        said = refusal(output)
        path.unlink() if path.is_symlink() or not path.is_dir() else path.rmdir()
        path.write_bytes(whole)
        return said

    elsewhere = output.parent / "elsewhere"
    elsewhere.write_bytes(whole)
    for action in (
        lambda: path.write_bytes(whole[:-1]),
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(whole + b"\n"),
        lambda: path.symlink_to(elsewhere),
        lambda: path.symlink_to("nowhere"),
        lambda: os.mkfifo(path),
        path.mkdir,
    ):
        assert name in replaced(action)
    path.unlink()
    assert name in refusal(output)


@pytest.mark.parametrize("name", ["extra", "base/model.bin", "adapter/.hidden", "new/deep/file"])
def test_a_file_too_many_is_named(output, name):
    (output / name).parent.mkdir(parents=True, exist_ok=True)
    (output / name).write_bytes(b"")
    assert f"extra {name}" in refusal(output)


def test_a_folder_replaced_by_a_link_is_named(output):
    (output / "base").rename(output.parent / "elsewhere")
    (output / "base").symlink_to(output.parent / "elsewhere")
    assert "base" in refusal(output)
    (output / "base").unlink()
    (output.parent / "elsewhere").rename(output / "base")
    (output / "more").symlink_to("/")
    assert "extra more" in refusal(output)


def test_two_tensors_of_equal_shape_that_were_swapped_are_named(model, tmp_path):
    single = tmp_path / "OUT"
    truncate(ModelLocation(str(model)), single, TruncateRequest(rank=2, workers=1))
    path = single / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{Q0}.weight"], tensors[f"{Q1}.weight"] = tensors[f"{Q1}.weight"], tensors[f"{Q0}.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    verify(single)  # the headers do not show it
    assert f"{path} (tensor {Q0}.weight)" in refusal(single, read_data=True)


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: content["options"].update(rank=3),
        lambda content: content["files"].popitem(),
        lambda content: content["tensors"].popitem(),
        lambda content: content.update(digest="0" * 64),
        lambda content: content.pop("digest"),
        lambda content: content.update(schema=3),
    ],
)
def test_an_edited_manifest_is_refused(output, edit):
    content = json.loads((output / MANIFEST).read_text())
    edit(content)
    (output / MANIFEST).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    assert MANIFEST in refusal(output)


def test_exit_codes(output, model, tmp_path, capsys):
    (output / "base" / "tokenizer.json").write_text("[]")
    done = inside(capsys, "verify", output, "--read-data", "--json")
    assert (done.code, done.out) == (ExitCode.INTEGRITY, "")
    assert "tokenizer.json" in done.err
    assert inside(capsys, "verify", model).code == ExitCode.INTEGRITY
    assert inside(capsys, "verify", tmp_path / "nowhere").code == ExitCode.INVALID
