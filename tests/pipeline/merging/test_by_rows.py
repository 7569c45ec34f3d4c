"""Terms added while a tensor is streamed: the same bytes for any block size, read back at once, in little memory."""

import json
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from blake3 import blake3
from safetensors.torch import save_file

from kasa_cli.checkpoint.manifest import load as load_manifest
from kasa_cli.checkpoint.safetensors_file import read_header
from kasa_cli.checkpoint.safetensors_writer import filling, lay_out
from kasa_cli.errors import IntegrityError
from kasa_cli.files import direct_io
from kasa_cli.pipeline import base_writer
from kasa_cli.pipeline.merging import by_rows
from kasa_cli.pipeline.merging.run import MergeRequest, ModelLocation, RunOptions, merge
from kasa_cli.pipeline.merging.whole_tensor import WholeTensor
from kasa_cli.pipeline.verifying.integrity import check_hashes
from kasa_cli.pipeline.workers import Silent
from tests.builders import tiny_models
from tests.builders.adapters import CASES, CONFIG, WEIGHTS, saved
from tests.builders.folders import tree_hash
from tests.builders.runs import environment

MODEL = "model.safetensors"
UNTIED = ("embedding-tied",)
MERGED = sorted({*CASES} - {"pissa-niter"})  # the base of its initialisation is not available


def merged(name, tmp_path, out, **options):
    """The report of a merge into a base in bfloat16, and the bytes of its file."""
    base = tmp_path / "half"
    if not base.exists():
        tiny_models.save(CASES[name].family, base, dtype=torch.bfloat16)
    options = MergeRequest(base_is="original", force_base=True, untie=name in UNTIED, **options)
    report = merge([saved(name)], ModelLocation(str(base)), out, options, RunOptions(1, use_store=False))
    return report, (out / MODEL).read_bytes()


@pytest.mark.parametrize("name", MERGED)
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_small_blocks_and_whole_tensors_make_the_same_bytes_and_figures(name, dtype, tmp_path, monkeypatch):
    streamed, at_once = merged(name, tmp_path, tmp_path / "a", dtype=dtype)
    monkeypatch.setattr(by_rows, "BLOCK_ENTRIES", 64)
    monkeypatch.setattr(by_rows, "LEAST_ROWS", 3)
    assert merged(name, tmp_path, tmp_path / "b", dtype=dtype)[1] == at_once
    monkeypatch.setattr("kasa_cli.pipeline.merging.merger.TensorEdits.is_whole", True)
    whole, stored = merged(name, tmp_path, tmp_path / "c", dtype=dtype)
    assert stored == at_once
    for one, other in zip(streamed.tensors, whole.tensors, strict=True):
        assert (one.name, one.terms) == (other.name, other.terms)
        assert one.max_abs_change == pytest.approx(other.max_abs_change, rel=1e-6)
        assert one.rounding_error == pytest.approx(other.rounding_error, rel=1e-4, abs=1e-12)
    for out in ("a", "b", "c"):
        require_hashes_of_the_base(tmp_path / "half", load_manifest(tmp_path / out))


def require_hashes_of_the_base(base, manifest):
    """The manifest of a merge records its changes, tensor by tensor."""
    container = read_header(base / MODEL)
    content = container.path.read_bytes()
    for name, record in manifest.tensors.items():
        entry = container.tensors[record.stored.made_from or name]
        digest = record.input_blake3 if record.role == "merged" else record.blake3
        assert digest == blake3(content[entry.begin : entry.end]).hexdigest(), name
        assert (record.role == "merged") == (record.input_blake3 is not None)


WHOLE = {"lora-bias", "dora-conv1d", "ia3-conv1d", "dora-embedding", "hira-embedding", "oft-embedding"}
"""Cases in which a whole tensor is in memory: shifts of biases, and maps of transposed weights."""


@pytest.mark.parametrize("name", MERGED)
def test_few_tensors_are_ever_held_whole(name, tmp_path, monkeypatch):
    held = []
    whole = WholeTensor.pieces
    monkeypatch.setattr(
        WholeTensor, "pieces", lambda self, dtype: held.append(self.name) or whole(self, dtype)
    )
    merged(name, tmp_path, tmp_path / "out")
    assert bool(held) == (name in WHOLE)


def test_many_workers_and_one_make_the_same_output(tmp_path):
    base, adapter = tiny_models.save("llama", tmp_path / "base"), saved("lora")
    options = MergeRequest(max_shard_size="20KB")
    for workers in (1, 16):
        merge(
            [adapter],
            ModelLocation(str(base)),
            tmp_path / str(workers),
            options,
            RunOptions(workers, use_store=False),
        )
    assert tree_hash(tmp_path / "1") == tree_hash(tmp_path / "16")
    check_hashes(tmp_path / "1", load_manifest(tmp_path / "1"), 1, Silent())


def test_of_many_files_few_are_open(tmp_path, monkeypatch):
    """A process may open only a limited number of files, fewer than a checkpoint may have shards."""
    base, adapter = tiny_models.save("llama", tmp_path / "base"), saved("lora")
    options = MergeRequest(max_shard_size="20KB")
    num_open, most = [0], [0]

    @contextmanager
    def counted(*args, opened=base_writer.opened_directly):
        num_open[0] += 1
        most[0] = max(most[0], num_open[0])
        with opened(*args) as file:
            yield file
        num_open[0] -= 1

    monkeypatch.setattr(base_writer, "opened_directly", counted)
    monkeypatch.setattr(base_writer, "OPEN_FILES", 2)
    merge([adapter], ModelLocation(str(base)), tmp_path / "OUT", options, RunOptions(2, use_store=False))
    assert most[0] == 2 and len(list((tmp_path / "OUT").glob("*.safetensors"))) > 4
    check_hashes(tmp_path / "OUT", load_manifest(tmp_path / "OUT"), 1, Silent())


def test_bytes_that_do_not_read_back_as_written_are_found(tmp_path, monkeypatch):
    def slip(descriptor, data, offset, pwrite=direct_io.pwrite_all):
        data = bytearray(data)
        if len(data) > 1000:
            data[7] ^= 4
        pwrite(descriptor, memoryview(data), offset)

    monkeypatch.setattr(direct_io, "pwrite_all", slip)
    with pytest.raises(IntegrityError, match="the bytes read back differ from those written"):
        merged("lora", tmp_path, tmp_path / "OUT")
    assert not (tmp_path / "OUT").exists()


TALL, SMALL = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"


def low_rank(rows, names):
    return {names[0]: torch.randn(4, 1024), names[1]: torch.randn(rows, 4)}


KINDS = {
    "lora": (
        lambda rows: low_rank(rows, [f"{TALL}.lora_A.weight", f"{TALL}.lora_B.weight"]),
        {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["up_proj"]},
    ),
    "loha": (
        lambda rows: {
            **low_rank(rows, [f"{TALL}.hada_w1_b", f"{TALL}.hada_w1_a"]),
            **low_rank(rows, [f"{TALL}.hada_w2_b", f"{TALL}.hada_w2_a"]),
        },
        {"peft_type": "LOHA", "r": 4, "alpha": 4, "target_modules": ["up_proj"]},
    ),
    "saved": (
        lambda rows: {
            **low_rank(16, [f"{SMALL}.lora_A.weight", f"{SMALL}.lora_B.weight"]),
            f"{TALL}.weight": torch.randn(rows // 8, 1024).repeat(8, 1),
        },
        {
            "peft_type": "LORA",
            "r": 4,
            "lora_alpha": 4,
            "target_modules": ["gate_proj"],
            "modules_to_save": ["up_proj"],
        },
    ),
}


def one_weight(folder, rows, kind):
    """A checkpoint of an unknown family with one tall weight and a small one, and an adapter of it."""
    base, adapter = folder / "base", folder / "adapter"
    for place in (folder, base, adapter):
        place.mkdir()
    shapes = [(f"{TALL}.weight", "BF16", (rows, 1024)), (f"{SMALL}.weight", "BF16", (16, 1024))]
    with filling(base / MODEL, lay_out(shapes)) as file:
        file.put(shapes[0][0], torch.randn(rows // 8, 1024).to(torch.bfloat16).repeat(8, 1))
        file.put(shapes[1][0], torch.randn(16, 1024).to(torch.bfloat16))
    (base / "config.json").write_text('{"model_type": "none-of-these"}')
    make, words = KINDS[kind]
    tensors = {f"base_model.model.{name}": tensor for name, tensor in make(rows).items()}
    save_file(tensors, adapter / WEIGHTS, {"format": "pt"})
    (adapter / CONFIG).write_text(json.dumps({**words, "peft_version": "0.21.2"}))
    return folder


ONE_AFTER_THE_OTHER = """
import sys
from pathlib import Path
from kasa_cli.pipeline.merging.run import MergeRequest, RunOptions, ModelLocation, merge
for folder in map(Path, sys.argv[1:]):
    base, running = ModelLocation(str(folder / "base")), RunOptions(1, use_store=False)
    merge([folder / "adapter"], base, folder / "OUT", MergeRequest(), running)
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(int(peak.split()[1]) << 10)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow_with_the_weight(kind, tmp_path):
    rows = (16_000, 96_000)
    folders = [one_weight(tmp_path / str(n), n, kind) for n in rows]
    command = [sys.executable, "-c", ONE_AFTER_THE_OTHER, *map(str, folders)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=True)
    first, second = map(int, done.stdout.split())
    weight, factors = (rows[1] - rows[0]) * 1024 * 2, 2 * (rows[1] - rows[0]) * 4 * (4 + 8)
    assert second - first < weight / 6 and factors < weight / 16
