"""Terms added while a tensor streams by: the same bytes whatever the blocks, read back at once, in little memory."""

import copy
import json
import subprocess
import sys

import pytest
import tiny_models
import torch
from adapters import CONFIG, WEIGHTS, saved
from faults import tree_hash
from runs import environment
from safetensors.torch import save_file

from kasa_cli.checkpoint import direct
from kasa_cli.checkpoint.manifest import load as load_manifest
from kasa_cli.checkpoint.streaming import filling, form
from kasa_cli.commands.merge import Options, Running, Where, merge
from kasa_cli.errors import IntegrityError
from kasa_cli.pipeline import operate, streamed
from kasa_cli.pipeline.intact import check_hashes
from kasa_cli.pipeline.operation import Operation
from kasa_cli.pipeline.workers import Silent

MODEL = "model.safetensors"
CASES = {
    "lora": "llama",
    "conv1d": "gpt2",
    "experts-gpt-oss": "gpt-oss",
    "experts": "mixtral",
    "kasa": "llama",
}


def merged(name, tmp_path, out, **options):
    base = tmp_path / "half"
    if not base.exists():
        tiny_models.save(CASES[name], tmp_path / "full")
        model = copy.deepcopy(tiny_models.build(CASES[name])).to(torch.bfloat16)
        model.save_pretrained(base)
    options = Options(base_is="original", **options)
    merge([saved(name, tmp_path)], Where(str(base)), out, options, Running(1, use_store=False))
    return (out / MODEL).read_bytes()


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_small_blocks_and_whole_tensors_make_the_same_bytes(name, dtype, tmp_path, monkeypatch):
    at_once = merged(name, tmp_path, tmp_path / "a", dtype=dtype)
    monkeypatch.setattr(streamed, "BLOCK_ENTRIES", 64)
    monkeypatch.setattr(streamed, "LEAST_ROWS", 3)
    assert merged(name, tmp_path, tmp_path / "b", dtype=dtype) == at_once
    monkeypatch.setattr("kasa_cli.pipeline.merging.Orders.adds_terms", False)
    whole = Operation.pieces
    used = []
    monkeypatch.setattr(Operation, "pieces", lambda *args: used.append(args) or whole(*args))
    assert merged(name, tmp_path, tmp_path / "c", dtype=dtype) == at_once and used


def test_files_from_end_to_end_and_tensors_in_parallel_make_the_same_output(tmp_path, monkeypatch):
    """Hashes of files that were taken on the way among them: the manifest holds them."""
    base, adapter = tiny_models.save("llama", tmp_path / "base"), saved("lora", tmp_path)
    options, modes = Options(max_shard_size="20KB"), []
    monkeypatch.setattr(
        operate, "_by_tensor", lambda *args, by=operate._by_tensor: modes.append(args) or by(*args)
    )
    for workers in (1, 16):
        merge(
            [adapter], Where(str(base)), tmp_path / str(workers), options, Running(workers, use_store=False)
        )
        assert len(modes) == (workers > 1)
    assert tree_hash(tmp_path / "1") == tree_hash(tmp_path / "16")
    check_hashes(tmp_path / "1", load_manifest(tmp_path / "1"), 1, Silent())


def test_bytes_that_do_not_read_back_as_written_are_found(tmp_path, monkeypatch):
    def slip(descriptor, data, offset, pwrite=direct.pwrite_all):
        data = bytearray(data)
        if len(data) > 1000:
            data[7] ^= 4
        pwrite(descriptor, memoryview(data), offset)

    monkeypatch.setattr(direct, "pwrite_all", slip)
    with pytest.raises(IntegrityError, match="read back other than written"):
        merged("lora", tmp_path, tmp_path / "OUT")
    assert not (tmp_path / "OUT").exists()


def one_weight(folder, rows):
    """A checkpoint of an unknown family with one linear weight, and a LoRA on it."""
    name = "model.layers.0.mlp.up_proj"
    base, adapter = folder / "base", folder / "adapter"
    for place in (folder, base, adapter):
        place.mkdir()
    with filling(base / MODEL, form([(f"{name}.weight", "BF16", (rows, 1024))])) as file:
        file.put(f"{name}.weight", torch.randn(rows // 8, 1024).to(torch.bfloat16).repeat(8, 1))
    (base / "config.json").write_text('{"model_type": "none-of-these"}')
    key = f"base_model.model.{name}.lora_"
    factors = {f"{key}A.weight": torch.randn(4, 1024), f"{key}B.weight": torch.randn(rows, 4)}
    save_file(factors, adapter / WEIGHTS, {"format": "pt"})
    words = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["up_proj"],
        "peft_version": "0.21.2",
    }
    (adapter / CONFIG).write_text(json.dumps(words))
    return folder


ONE_AFTER_THE_OTHER = """
import sys
from pathlib import Path
from kasa_cli.commands.merge import Options, Running, Where, merge
for folder in map(Path, sys.argv[1:]):
    merge([folder / "adapter"], Where(str(folder / "base")), folder / "OUT", Options(), Running(1, use_store=False))
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(int(peak.split()[1]) << 10)
"""


def test_memory_does_not_grow_with_the_weight(tmp_path):
    rows = (16_000, 128_000)
    folders = [one_weight(tmp_path / str(n), n) for n in rows]
    command = [sys.executable, "-c", ONE_AFTER_THE_OTHER, *map(str, folders)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=True)
    first, second = map(int, done.stdout.split())
    weight, factors = (rows[1] - rows[0]) * 1024 * 2, (rows[1] - rows[0]) * 4 * (4 + 8)
    assert second - first < weight / 8 and factors < weight / 32
