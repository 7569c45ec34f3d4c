"""`kasa verify --against`: every value is recomputed, so that it also finds a change with forged hashes."""

import hashlib
import json

import pytest
from safetensors.torch import load_file, save_file

from kasa_cli.checkpoint import manifest
from kasa_cli.checkpoint.safetensors_file import read_header
from kasa_cli.files.staging import MANIFEST
from kasa_cli.files.typed_json import to_json
from kasa_cli.pipeline.file_records import file_records
from kasa_cli.pipeline.truncating.run import ModelLocation, TruncateRequest, truncate
from kasa_cli.pipeline.verifying.run import verify
from tests.builders.checkpoints import changed, plain_model
from tests.builders.folders import tree_hash
from tests.builders.refusals import refusal

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def single(model, tmp_path):
    """An output whose base is one file."""
    truncate(ModelLocation(str(model)), tmp_path / "OUT", TruncateRequest(rank=2, workers=1))
    return tmp_path / "OUT"


def reseal(output, **tensors):
    """Make the manifest agree with the files and the new hashes of tensors, as a forger would."""
    path = output / MANIFEST
    content = json.loads(path.read_text())
    content.pop("digest")
    path.unlink()
    content["files"] = to_json(file_records(output, 1))
    base = read_header(output / "base" / "model.safetensors")
    for name, one in content["tensors"].items():
        entry = base.tensors[name]
        raw = base.path.read_bytes()[entry.begin : entry.end]
        one["sha256"] = hashlib.sha256(raw).hexdigest()
    path.write_bytes(manifest.seal(content))


def test_another_base_of_the_same_shapes_is_named(model, single, tmp_path):
    other = changed(model, tmp_path / "other", model__layers__1__mlp__up_proj=lambda W: W * 1.0001)
    assert "model.layers.1.mlp.up_proj.weight" in refusal(single, against=ModelLocation(str(other)))
    copied = changed(model, tmp_path / "copied", model__embed_tokens=lambda W: -W)
    assert "model.embed_tokens.weight" in refusal(single, against=ModelLocation(str(copied)))
    assert "model." in refusal(single, against=ModelLocation(str(plain_model(tmp_path / "wide", dim=17))))
    assert "layers.1" in refusal(
        single, against=ModelLocation(str(plain_model(tmp_path / "short", layers=1)))
    )
    assert "layers.2" in refusal(single, against=ModelLocation(str(plain_model(tmp_path / "long", layers=3))))


def rewrite(path, name, function):
    tensors = load_file(path)
    tensors[name] = function(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


def prefixed(part):
    return f"base_model.model.{Q0}.{part}"


@pytest.mark.parametrize(
    ("file", "name", "forge"),
    [
        ("base/model.safetensors", f"{Q0}.weight", lambda W, original: original),
        ("base/model.safetensors", f"{Q0}.weight", lambda W, original: W * (1 + 2**-20)),
        ("base/model.safetensors", "model.embed_tokens.weight", lambda W, original: -W),
        ("tail/adapter_model.safetensors", prefixed("lora_B.weight"), lambda W, original: W * 1.001),
        ("tail/adapter_model.safetensors", prefixed("lora_A.weight"), lambda W, original: W.flip(0)),
        ("adapter/adapter_model.safetensors", prefixed("lora_A.weight"), lambda W, original: W + 1e-7),
        ("adapter/adapter_model.safetensors", prefixed("lora_B.weight"), lambda W, original: W + 1e-3),
        ("adapter/adapter_model.safetensors", prefixed("lora_diag"), lambda W, original: -W),
    ],
)
def test_a_forger_who_mends_the_hashes_is_found_by_the_numbers(model, single, file, name, forge):
    original = load_file(model / "model.safetensors").get(name)
    rewrite(single / file, name, lambda W: forge(W, original))
    reseal(single)
    verify(single, read_data=True)
    said = refusal(single, against=ModelLocation(str(model)))
    assert (Q0 if Q0 in name else name) in said


def test_a_forged_companion_is_found(model, single):
    (single / "base" / "tokenizer.json").write_text("[]")
    reseal(single)
    verify(single, read_data=True)
    assert "tokenizer.json" in refusal(single, against=ModelLocation(str(model)))


def test_a_copied_tensor_is_compared_with_the_base_and_not_only_its_record(model, single):
    rewrite(single / "base/model.safetensors", "model.embed_tokens.weight", lambda W: -W)
    verify(single)
    assert "model.embed_tokens.weight" in refusal(single, against=ModelLocation(str(model)))


def test_the_base_is_only_read(model, single):
    before = tree_hash(model)
    verify(single, against=ModelLocation(str(model)))
    assert tree_hash(model) == before
