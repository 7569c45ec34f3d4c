"""How a base is stored: other dtypes, other shard sizes, and weights that cannot be truncated."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kasa_cli.errors import InvalidInput, NumericalError
from tests.builders import tiny_models
from tests.builders.checkpoints import INDEX, WEIGHTS, Tensors, logits, rewritten, tensors_of
from tests.builders.matrices import kept
from tests.builders.truncated import RANK, chosen, cut, refused

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Q0, DOWN1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("halved") / "model"
    tiny_models.save("llama", folder, max_shard_size="20KB", dtype=torch.bfloat16)
    return folder


@pytest.mark.parametrize(
    ("config", "tensor", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, None, "gptq"),
        ({"quantization_config": {"load_in_4bit": True}}, None, "unknown"),
        ({}, f"{Q0}.weight_scale_inv", "block-scaled FP8"),
        ({}, f"{Q0}.weight.quant_state.bitsandbytes__nf4", "bitsandbytes NF4"),
        ({}, f"{Q0}.SCB", "bitsandbytes int8"),
        ({}, f"{Q0}.qweight", "GPTQ or AWQ"),
        ({}, f"{Q0}.weight_packed", "compressed-tensors"),
        ({}, "model.layers.0.mlp.experts.down_proj_blocks", "MXFP4"),
    ],
)
def test_quantised_weights_are_refused_by_method(
    llama: Path, tmp_path: Path, config: dict[str, Any], tensor: str | None, method: str
) -> None:
    extra = {tensor: torch.zeros(4, dtype=torch.uint8)} if tensor else {}
    model = rewritten(llama, tmp_path / "model", lambda tensors: {**tensors, **extra}, **config)
    with pytest.raises(InvalidInput, match=rf"quantised \({method}\)"):
        chosen(model)


def test_wider_targets_in_a_narrow_model(halved: Path, tmp_path: Path) -> None:
    case = cut(halved, tmp_path / "out", dtype="float32")
    before, after = tensors_of(halved), tensors_of(case.out / "base")
    for row in case.report.tensors:
        W, stored = before.pop(row.name), after.pop(row.name)
        assert (row.dtype, row.stored_dtype, stored.dtype) == ("BF16", "F32", torch.float32)
        assert np.abs(stored.double().numpy() - kept(W, min(W.shape) - RANK)).max() <= 1e-6 * row.sigma_max
        assert torch.equal(case.truncated().get_submodule(row.module).weight, stored)
    assert all(
        torch.equal(before[name], after[name]) and after[name].dtype == torch.bfloat16 for name in before
    )
    config, old = (json.loads((folder / "config.json").read_text()) for folder in (case.out / "base", halved))
    assert config == {**old, "dtype": "float32"}
    assert {p.dtype for p in case.truncated().parameters()} == {torch.float32}
    check_index(case.out / "base")


def check_index(base: Path) -> None:
    """Assert that the index names the shard of every tensor and the size of all."""
    index = json.loads((base / INDEX).read_text())
    shards = {name: load_file(base / name) for name in sorted(set(index["weight_map"].values()))}
    assert {p.name for p in base.glob("*.safetensors")} == shards.keys()
    assert index["weight_map"] == {name: file for file, shard in shards.items() for name in shard}
    size = sum(tensor.nbytes for shard in shards.values() for tensor in shard.values())
    assert index["metadata"]["total_size"] == size


def test_the_older_key_of_the_dtype(halved: Path, tmp_path: Path) -> None:
    model = rewritten(halved, tmp_path / "model", lambda tensors: tensors)
    config = json.loads((model / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (model / "config.json").write_text(json.dumps(config))
    case = cut(model, tmp_path / "out", dtype="float32")
    assert json.loads((case.out / "base/config.json").read_text()) == {**config, "torch_dtype": "float32"}
    assert {p.dtype for p in case.truncated().parameters()} == {torch.float32}


def test_a_composite_model_in_a_wider_dtype_loads_so(tmp_path: Path) -> None:
    tiny_models.save("gemma3-vlm", tmp_path / "model", dtype=torch.bfloat16)
    case = cut(tmp_path / "model", tmp_path / "out", dtype="float32")
    loaded, written = case.truncated(), tensors_of(case.out / "base")
    for row in case.report.tensors:
        assert torch.equal(loaded.get_submodule(row.module).weight, written[row.name]), row.module


def test_values_that_do_not_fit(llama: Path, tmp_path: Path) -> None:
    def grown(tensors: Tensors) -> Tensors:
        return {**tensors, f"{Q0}.weight": tensors[f"{Q0}.weight"] * 1e6}

    model = rewritten(llama, tmp_path / "model", grown)
    with pytest.raises(NumericalError, match=f"does not fit F16: {Q0}"):
        cut(model, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("model", "size"), [("llama", "10KB"), ("halved", "10KB"), ("halved", "1GB")])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_another_shard_size(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, size: str, dtype: str
) -> None:
    source = request.getfixturevalue(model)
    case = cut(source, tmp_path / "out", dtype=dtype, max_shard_size=size)
    plain = cut(source, tmp_path / "plain", dtype=dtype)
    one, other = tensors_of(case.out / "base"), tensors_of(plain.out / "base")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    if size == "1GB":
        assert not (case.out / "base" / INDEX).exists()
    else:
        check_index(case.out / "base")
        assert len(list((case.out / "base").glob("*.safetensors"))) > 3
    assert torch.equal(logits(case.truncated()), logits(plain.truncated()))


@pytest.mark.parametrize("size", ["ten", "", "-1GB", "0", "0.0MB", "nanGB", "5GiB"])
def test_a_shard_size_that_is_none(llama: Path, size: str) -> None:
    assert size in refused(llama, max_shard_size=size)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("name", ["weights.safetensors", "weights.safetensors.index.json"])
def test_weights_that_the_config_names(halved: Path, tmp_path: Path, name: str, dtype: str) -> None:
    model = rewritten(halved, tmp_path / "model", lambda tensors: tensors, transformers_weights=name)
    (model / WEIGHTS).rename(model / "weights.safetensors")
    weight_map = dict.fromkeys(tensors_of(halved), "weights.safetensors")
    if name.endswith(".json"):
        (model / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    case = cut(model, tmp_path / "out", dtype=dtype)
    exact = cut(halved, tmp_path / "exact", dtype=dtype).truncated().get_submodule(Q0).weight
    assert torch.equal(case.truncated().get_submodule(Q0).weight, exact)
    assert "config.json names the files" in refused(model, max_shard_size="10KB")


@pytest.mark.parametrize("size", [None, "10KB"])
def test_dtypes_that_are_not_decomposed_are_copied(llama: Path, tmp_path: Path, size: str | None) -> None:
    def odd(tensors: Tensors) -> Tensors:
        steps = {"model.layers.0.steps": torch.arange(6).view(2, 3), "flags": torch.tensor([True, False])}
        small = tensors[f"{Q0}.weight"].to(torch.float8_e4m3fn)
        whole = (100 * tensors[f"{DOWN1}.weight"]).to(torch.int8)
        return {**tensors, **steps, f"{Q0}.weight": small, f"{DOWN1}.weight": whole}

    model = rewritten(llama, tmp_path / "model", odd)
    case = cut(model, tmp_path / "out", max_shard_size=size)
    skipped = {one.name: one.reason for one in case.report.skipped}
    assert skipped[f"{Q0}.weight"] == "dtype F8_E4M3 is not decomposed"
    assert skipped[f"{DOWN1}.weight"] == "dtype I8 is not decomposed"
    assert {"model.layers.0.steps", "flags"} <= skipped.keys()
    before, after = tensors_of(model), tensors_of(case.out / "base")
    for name in skipped:
        assert before[name].dtype == after[name].dtype
        assert bytes(before[name].view(torch.uint8).flatten().tolist()) == bytes(
            after[name].view(torch.uint8).flatten().tolist()
        )
    assert "dtype F8_E4M3" in refused(model, Q0)
