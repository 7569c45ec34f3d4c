"""`truncate` on every family: truncated weights against numpy's SVD, all else to the byte; transformers loads it."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kasa_cli.pipeline.truncating.run import ModelLocation, TruncateRequest, truncate
from tests.builders import tiny_models
from tests.builders.checkpoints import INDEX, tensors_of, weight_files
from tests.builders.matrices import kept
from tests.builders.truncated import RANK, Truncated

SHARDED = {"llama": "20KB", "gemma3-vlm": "30KB", "mixtral": "40KB", "t5": "20KB", "gpt2": "30KB"}
HALVES = {"llama-bfloat16": torch.bfloat16, "llama-float16": torch.float16}
CASES = [*tiny_models.FAMILIES, *HALVES]

ROUTERS = {"gate", "router", "shared_expert_gate"}
README = "---\nlicense: apache-2.0\nlanguage: en\ntags: [stale]\n---\n# The original's own words\n"
COMPANIONS = {
    "tokenizer.json": '{"model": {"type": "BPE"}}',
    "tokenizer_config.json": "{}",
    "spiece.model": "\x00\x01 not text",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/x.jinja": "{{ tools }}",
    "modeling_x.py": "raise RuntimeError('never run')\n",
    "LICENSE": "a licence\n",
    "1_Pooling/config.json": '{"word_embedding_dimension": 4}',
}
STALE = {
    "pytorch_model.bin": "stale",
    "tf_model.h5": "stale",
    "model-q4.gguf": "stale",
    "model.fp16.safetensors": "stale",
    "adapter_config.json": "{}",
    "training_args.bin": "stale",
    ".gitattributes": "*.bin filter=lfs",
}
STALE_DIRECTORIES = {"original/consolidated.00.pth": "stale", "checkpoint-5/model.safetensors": "stale"}


@dataclass(frozen=True)
class Case(Truncated):
    """A truncated family, and the hashes of its checkpoint before truncation."""

    before: dict[str, str]


def fill_folder(model: Path) -> None:
    """Add every kind of file that may lie beside the weights on the Hub."""
    for name, text in {**COMPANIONS, **STALE, **STALE_DIRECTORIES, "README.md": README}.items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(text)


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    name = request.param
    model = tmp_path_factory.mktemp("secret-home") / "model"
    if name in HALVES:
        tiny_models.save("llama", model, dtype=HALVES[name])
    else:
        tiny_models.save(name, model, max_shard_size=SHARDED.get(name, "1GB"))
    fill_folder(model)
    before = hashes(model)
    out = model.parent / "out"
    report = truncate(ModelLocation(str(model)), out, TruncateRequest(rank=RANK, workers=1))
    yield Case(name, model, out, report, before)
    shutil.rmtree(model.parent)


# --- independent readers ---


def raw(path: Path) -> tuple[bytes, dict[str, bytes]]:
    """The header of a safetensors file, and the bytes of every tensor by the offsets in the header."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    places = {name: [start + at for at in entry["data_offsets"]] for name, entry in header.items()}
    assert max(end for _, end in places.values()) == len(data)
    return data[:start], {name: data[begin:end] for name, (begin, end) in places.items()}


def ulps(stored: torch.Tensor, exact: np.ndarray) -> torch.Tensor:
    """The largest number of representable values between a tensor and the exact values rounded to its dtype."""
    keys = []
    for tensor in (stored, torch.from_numpy(exact).to(stored.dtype)):
        bits = tensor.contiguous().view(torch.int16).to(torch.int64)
        keys.append(torch.where(bits < 0, -(bits & 0x7FFF), bits))
    return (keys[0] - keys[1]).abs()


def load(folder: Path, automatic: bool = False) -> tuple[PreTrainedModel, dict[str, Any]]:
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model_class = transformers.AutoModel if automatic else getattr(transformers, architecture)
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    return model, {key: sorted(map(str, value)) for key, value in info.items()}


# --- the contract, family by family ---


def test_what_is_named_is_truncated(case: Case) -> None:
    before, after = tensors_of(case.model), tensors_of(case.base)
    assert case.report.tensors
    for row in case.report.tensors:
        W, stored = before[row.name], after[row.name]
        exact = kept(W, min(W.shape) - RANK)
        assert stored.dtype == W.dtype
        if stored.dtype == torch.float32:
            assert np.abs(stored.double().numpy() - exact).max() <= 1e-6 * row.sigma_max, row.name
        else:
            off = ulps(stored, exact)
            assert off.max() <= 1 and (off > 0).float().mean() < 1e-3, row.name


def test_all_else_keeps_its_bytes_and_its_place(case: Case) -> None:
    touched = {row.name for row in case.report.tensors}
    assert [p.name for p in weight_files(case.model)] == [p.name for p in weight_files(case.base)]
    assert len(weight_files(case.model)) > 1 or case.family not in SHARDED
    for path in weight_files(case.model):
        (header, tensors), (new_header, new_tensors) = raw(path), raw(case.base / path.name)
        assert header == new_header
        assert {name for name in tensors if tensors[name] != new_tensors[name]} == touched & tensors.keys()
    if (case.model / INDEX).exists():
        assert (case.model / INDEX).read_bytes() == (case.base / INDEX).read_bytes()


def test_every_tensor_is_accounted_for(case: Case) -> None:
    operated = [row.name for row in case.report.tensors]
    skipped = {one.name: one.reason for one in case.report.skipped}
    assert sorted([*operated, *skipped]) == sorted(tensors_of(case.model))
    assert all(skipped.values())
    manifest = json.loads((case.out / "kasa.manifest.json").read_text())
    roles = {name: record["role"] for name, record in manifest["tensors"].items()}
    assert roles == {**dict.fromkeys(operated, "truncated"), **dict.fromkeys(skipped, "copied")}


def test_the_targets_are_the_linear_maps_of_the_blocks(case: Case) -> None:
    model, _ = load(weights_only(case))
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = {
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and any(part.isdecimal() for part in path.split("."))
        and not ROUTERS.intersection(path.split("."))
    }
    assert {row.module for row in case.report.tensors} == linear


def expected_reason(parts: set[str]) -> str | None:
    """The reason why a matrix of this name is not truncated; None if the name gives no reason."""
    for names, reason in {
        (
            "experts",
            "input_linear",
            "output_linear",
        ): "expert, fused in memory: PEFT has no KaSA for fused experts",
        tuple(ROUTERS): "router",
        ("embed_tokens", "wte", "wpe", "shared", "embed_in", "word_embeddings"): "embedding",
        ("lm_head", "embed_out"): "output head",
    }.items():
        if parts.intersection(names):
            return reason
    return None


def test_embeddings_heads_routers_and_experts_say_why_they_are_left(case: Case) -> None:
    reasons = {one.name: one.reason for one in case.report.skipped}
    for name in [name for name, tensor in tensors_of(case.model).items() if tensor.dim() > 1]:
        expected = expected_reason(set(name.split(".")))
        assert expected is None or reasons[name] == expected, name


@pytest.mark.parametrize("automatic", [False, True], ids=["own class", "AutoModel"])
def test_transformers_loads_the_base_as_it_loads_the_original(case: Case, automatic: bool) -> None:
    original, info = load(weights_only(case), automatic)
    cut, new_info = load(case.base, automatic)
    assert new_info == info
    assert automatic or not any(info.values())
    prefix = f"{type(original).base_model_prefix}."
    modules = {row.module for row in case.report.tensors}
    touched = {f"{module}.weight" for module in modules | {module.removeprefix(prefix) for module in modules}}
    before, after = original.state_dict(), cut.state_dict()
    assert before.keys() == after.keys()
    kept = before.keys() - info["missing_keys"]  # missing tensors are random at every load
    changed = {name for name in kept if not torch.equal(before[name], after[name])}
    assert changed == touched & before.keys()
    assert automatic or len(changed) == len(modules)


def weights_only(case: Case) -> Path:
    """The original without the stale files, as loaders would prefer some of them."""
    folder = case.model.parent / "clean"
    if not folder.exists():
        folder.mkdir()
        names = ["config.json", *(p.name for p in weight_files(case.model))]
        names += [INDEX] if (case.model / INDEX).exists() else []
        for name in names:
            (folder / name).symlink_to(case.model / name)
    return folder


def test_everything_that_belongs_to_the_model_goes_along(case: Case) -> None:
    left = {*STALE, *STALE_DIRECTORIES}
    assert hashes(case.base).keys() == case.before.keys() - left
    weights = {path.name for path in weight_files(case.model)}
    for name in case.before.keys() - left - weights - {"README.md"}:
        assert (case.base / name).read_bytes() == (case.model / name).read_bytes(), name
    assert {*COMPANIONS, "config.json"} <= hashes(case.base).keys()
    recorded = json.loads((case.out / "kasa.manifest.json").read_text())["left_out"]
    assert recorded.keys() == {*STALE, *(name.split("/")[0] for name in STALE_DIRECTORIES)}
    assert all(recorded.values())


def test_the_card_is_new_and_carries_the_licence(case: Case) -> None:
    for card in (case.base / "README.md", case.out / "README.md"):
        front = card.read_text().split("---")[1]
        assert "license: apache-2.0" in front and "language: en" in front and "stale" not in front
        assert "own words" not in card.read_text()


def test_no_local_path_is_in_the_output(case: Case) -> None:
    for path in case.out.rglob("*"):
        if path.is_file():
            assert b"secret-home" not in path.read_bytes(), path


def test_the_input_is_as_it_was(case: Case) -> None:
    assert hashes(case.model) == case.before
