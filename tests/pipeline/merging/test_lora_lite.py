"""Adapters of lora-lite through the command line: one file with its config in the header, merged into a base.

The oracle is the layer as lora-lite runs it: an output made from an input by the forward formulas of each method, on
the frozen weight. A merged layer must give that output to every input, so it is asked about the unit vectors and 0.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kasa_cli.checkpoint import manifest
from kasa_cli.errors import ExitCode
from tests.builders import tiny_models
from tests.builders.adapters import save_lite
from tests.builders.checkpoints import tensors_of
from tests.builders.matrices import assert_close
from tests.builders.runs import inside

Tensors = dict[str, Tensor]
Layer = Callable[[Tensor], Tensor]
R, ALPHA, GROUP = 4, 6.0, 8
SCALE = ALPHA / R
COMMON = {
    "r": R,
    "alpha": ALPHA,
    "target_roles": ["reader", "writer"],
    "target_names": [],
    "exclude_names": ["lm_head", "embed_tokens"],
    "layers": None,
}
MODULES = {
    f"model.layers.{layer}.{module}": sides
    for layer in range(2)
    for module, sides in {
        "self_attn.q_proj": (32, 32),
        "self_attn.v_proj": (16, 32),
        "mlp.down_proj": (32, 48),
    }.items()
}
"""(out, in) of the adapted layers: square, wide and tall."""


# --- the layers, as they run ---


def affine(W: Tensor, b: Tensor) -> Layer:
    return lambda x: x @ W.T + b


def lora(W: Tensor, b: Tensor, t: Tensors) -> Layer:
    return lambda x: affine(W, b)(x) + SCALE * (x @ t["lora_A"].T) @ t["lora_B"].T


def pissa(W: Tensor, b: Tensor, t: Tensors) -> Layer:
    """The base lacks s B_0 A_0, computed from it in float32 and rounded to the dtype of the file."""
    U, S, Vh = torch.linalg.svd(W.float(), full_matrices=False)
    root = (S[:R] / SCALE).sqrt()
    B, A = ((U[:, :R] * root).to(t["dtype"]), (root[:, None] * Vh[:R]).to(t["dtype"]))
    return lora(W - SCALE * B.double() @ A.double(), b, t)


def dora(W: Tensor, b: Tensor, t: Tensors) -> Layer:
    V = W + SCALE * t["lora_B"] @ t["lora_A"]
    return lambda x: (x @ V.T) * (t["lora_m"] / V.norm(dim=1)) + b


def delora(W: Tensor, b: Tensor, t: Tensors) -> Layer:
    A, B = t["lora_A"], t["lora_B"]
    strength = t["lora_lambda"] / R / (A.norm(dim=1).clamp(min=1e-4) * B.norm(dim=0).clamp(min=1e-4))
    return lambda x: affine(W, b)(x) + (((x * t["lora_wnorm"]) @ A.T) * strength) @ B.T


def hra(W: Tensor, b: Tensor, t: Tensors) -> Layer:
    def run(x: Tensor) -> Tensor:
        for u in reversed(t["lora_U"]):  # the last reflection is applied to the input first
            x = x - 2 * torch.outer(x @ u, u) / (u @ u).clamp(min=1e-12)
        return affine(W, b)(x)

    return run


def ia3(W: Tensor, b: Tensor, t: Tensors) -> Layer:
    return lambda x: affine(W, b)(x) * t["lora_g"]


def ia3_ff(W: Tensor, b: Tensor, t: Tensors) -> Layer:
    return lambda x: affine(W, b)(x * t["lora_g"])


def road(variant: int) -> Callable[[Tensor, Tensor, Tensors], Layer]:
    """Pairs (i, i + 4) of each group of 8 outputs are rotated and scaled: one angle per pair, per output, or two."""

    def layer(W: Tensor, b: Tensor, t: Tensors) -> Layer:
        theta, alpha = t["lora_road_theta"], t["lora_road_alpha"]
        half = GROUP // 2

        def numbers(group: int, i: int) -> tuple[tuple[float, float], tuple[float, float]]:
            if variant == 1:
                at = group * half + i % half
                return (theta[at], alpha[at]), (theta[at], alpha[at])
            if variant == 2:
                at = group * GROUP + i
                return (theta[at], alpha[at]), (theta[at], alpha[at])
            first, second = 2 * group * GROUP + i, (2 * group + 1) * GROUP + i
            return (theta[first], alpha[first]), (theta[second], alpha[second])

        def run(x: Tensor) -> Tensor:
            y = affine(W, b)(x)
            turned = torch.empty_like(y)
            for at in range(y.shape[1]):
                group, i = divmod(at, GROUP)
                (angle, length), (other_angle, other_length) = numbers(group, i)
                partner = -y[:, at + half] if i < half else y[:, at - half]
                turned[:, at] = y[:, at] * length * math.cos(angle)
                turned[:, at] += partner * other_length * math.sin(other_angle)
            return turned

        return run

    return layer


def antipasto(basis: str) -> Callable[[Tensor, Tensor, Tensors], Layer]:
    """Blocks of four directions turned by a Cayley rotation; the residual from the file's own U, S and V."""

    def layer(W: Tensor, b: Tensor, t: Tensors) -> Layer:
        U, S, Vh = t["lora_U"], t["lora_S"], t["lora_Vh"]
        W_res = W - U @ torch.diag(S) @ Vh
        R_all = torch.eye(len(S), dtype=torch.float64)
        limit = 2 * math.tan(0.5 / 2)
        for block, angles in enumerate(t.get("lora_rot_T", [])):
            A = torch.zeros(4, 4, dtype=torch.float64)
            for angle, (i, j) in zip(angles, [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)], strict=True):
                A[i, j], A[j, i] = angle / 2, -angle / 2
            X = limit * torch.tanh(A / limit) / 2
            eye = torch.eye(4, dtype=torch.float64)
            R_all[4 * block : 4 * block + 4, 4 * block : 4 * block + 4] = torch.linalg.inv(eye - X) @ (
                eye + X
            )
        U, Vh = (U @ R_all.T if basis == "U" else U), (R_all @ Vh if basis == "V" else Vh)
        return lambda x: affine(W_res, b)(x) + ((x @ Vh.T) * (S + t["lora_delta_s"])) @ U.T

    return layer


# --- their files ---


def random(*shape: int, std: float = 0.3, mean: float = 0.0) -> Tensor:
    return mean + std * torch.randn(shape)


def factors(outs: int, ins: int, W: Tensor) -> Tensors:
    return {"lora_A": random(R, ins), "lora_B": random(outs, R)}


def directions(outs: int, ins: int, W: Tensor) -> Tensors:
    """Some singular directions of the base other than the largest, as if chosen by data."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    taken = torch.arange(1, 16, 2)[:8]
    return {
        "lora_U": U[:, taken].clone(),
        "lora_S": S[taken].clone(),
        "lora_Vh": Vh[taken].clone(),
        "lora_delta_s": random(8, std=0.1),
    }


def gates(size: Callable[[int, int], int], name: str = "lora_g") -> Callable[[int, int, Tensor], Tensors]:
    return lambda outs, ins, W: {name: random(size(outs, ins), mean=1)}


def turns(per_output: float) -> Callable[[int, int, Tensor], Tensors]:
    def tensors(outs: int, ins: int, W: Tensor) -> Tensors:
        size = int(outs * per_output)
        return {"lora_road_theta": random(size), "lora_road_alpha": random(size, mean=1)}

    return tensors


def with_rotations(outs: int, ins: int, W: Tensor) -> Tensors:
    return {**directions(outs, ins, W), "lora_rot_T": random(2, 6, std=1)}


def with_norms(outs: int, ins: int, W: Tensor) -> Tensors:
    norms = {"lora_lambda": torch.tensor(1.7), "lora_wnorm": W.norm(dim=0)}
    return {**factors(outs, ins, W), **norms}


ROTATED = {"r": 8, "block_size": 4, "max_rotation_angle": 0.5}
CASES: dict[str, tuple[str, dict[str, Any], Callable[..., Tensors], Callable[..., Layer]]] = {
    "lora": ("lora", {}, factors, lora),
    "eva": ("eva", {}, factors, lora),
    "pissa": ("pissa", {}, factors, pissa),
    "dora": ("dora", {}, lambda o, i, W: {**factors(o, i, W), "lora_m": random(o, mean=1)}, dora),
    "delora": ("delora", {"lambda0": 15.0}, with_norms, delora),
    "hra": ("hra", {}, lambda o, i, W: {"lora_U": random(R, i)}, hra),
    "ia3": ("ia3", {}, gates(lambda o, i: o), ia3),
    "ia3_ff": ("ia3_ff", {}, gates(lambda o, i: i), ia3_ff),
    "road-1": ("road", {"road_variant": "road_1", "group_size": GROUP}, turns(0.5), road(1)),
    "road-2": ("road", {"road_variant": "road_2", "group_size": GROUP}, turns(1), road(2)),
    "road-4": ("road", {"road_variant": "road_4", "group_size": GROUP}, turns(2), road(4)),
    "antipasto-V": ("antipasto", {**ROTATED, "rotate_basis": "V"}, with_rotations, antipasto("V")),
    "antipasto-U": ("antipasto", {**ROTATED, "rotate_basis": "U"}, with_rotations, antipasto("U")),
    "antipasto-none": ("antipasto", {**ROTATED, "rotate_basis": "none"}, directions, antipasto("none")),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def written(name: str, path: Path, base: Path, dtype: str = "float32", **config: Any) -> Path:
    """A file as lora-lite saves it: tensors in the dtype of the config, the config as JSON in the header."""
    torch.manual_seed(0)
    variant, more, make, _ = CASES[name]
    weights = tensors_of(base)
    tensors = {
        f"{module}.{short}": tensor.to(DTYPES[dtype]).contiguous()
        for module, sides in MODULES.items()
        for short, tensor in make(*sides, weights[f"{module}.weight"]).items()
    }
    return save_lite(path, tensors, **{"variant": variant, **COMMON, "dtype": dtype, **more, **config})


def run_layers(name: str, file: Path, base: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight and bias of each adapted layer, from its outputs for the unit vectors and for 0."""
    tensors, weights = load_file(file), tensors_of(base)
    found = {}
    for module, (outs, ins) in MODULES.items():
        own: dict[str, Any] = {
            key.removeprefix(f"{module}."): tensor.double()
            for key, tensor in tensors.items()
            if key.startswith(f"{module}.")
        }
        own["dtype"] = next(iter(tensors.values())).dtype
        bias = weights.get(f"{module}.bias", torch.zeros(outs)).double()
        layer = CASES[name][3](weights[f"{module}.weight"].double(), bias, own)
        b = layer(torch.zeros(1, ins, dtype=torch.float64))[0]
        found[module] = (layer(torch.eye(ins, dtype=torch.float64)) - b).T, b
    return found


def merged(capsys, file: Path, base: Path, out: Path, *options: object):
    return inside(capsys, "merge", file, "--into", base, "-o", out, "--no-store", *options)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_a_merged_layer_answers_as_the_one_that_ran(name, dtype, family, tmp_path, capsys):
    base = tiny_models.saved(family)
    file = written(name, tmp_path / "adapter.safetensors", base, dtype)
    done = merged(capsys, file, base, tmp_path / "OUT", "--json")
    assert done.code == 0, done.err
    before, after = tensors_of(base), tensors_of(tmp_path / "OUT")
    told = {one["name"] for one in done.json["tensors"]}
    for module, (W, b) in run_layers(name, file, base).items():
        assert_close(after[f"{module}.weight"], W)
        assert float((W - before[f"{module}.weight"]).abs().max()) > 1e-2
        if f"{module}.bias" in after:
            assert_close(after[f"{module}.bias"], b)
            assert (f"{module}.bias" in told) == (name in ("ia3", "road-1", "road-2", "road-4"))
        assert f"{module}.weight" in told
    untouched = before.keys() - told
    assert done.json["totals"]["tensors_copied"] == len(untouched)
    assert all(torch.equal(before[one], after[one]) for one in untouched)
    (row,) = done.json["adapters"]
    assert row["tensors_consumed"] == row["tensors_total"] == len(load_file(file))
    assert row["kind"].startswith("lite-")


@pytest.mark.parametrize("name", ["lora", "pissa", "delora", "antipasto-V"])
def test_a_weight_scales_what_is_a_sum(name, tmp_path, capsys):
    base = tiny_models.saved("llama")
    file = written(name, tmp_path / "adapter.safetensors", base)
    done = merged(capsys, file, base, tmp_path / "OUT", "--weight", -0.5)
    assert done.code == 0, done.err
    before, after = tensors_of(base), tensors_of(tmp_path / "OUT")
    for module, (W, _) in run_layers(name, file, base).items():
        start = before[f"{module}.weight"].double()
        assert_close(after[f"{module}.weight"], start - 0.5 * (W - start))


@pytest.mark.parametrize("name", ["dora", "hra", "ia3", "ia3_ff", "road-1"])
def test_what_multiplies_has_no_weight(name, tmp_path, capsys):
    base = tiny_models.saved("llama")
    file = written(name, tmp_path / "adapter.safetensors", base)
    done = merged(capsys, file, base, tmp_path / "OUT", "--weight", 0.5)
    assert (done.code, done.out) == (ExitCode.USAGE, "") and "weight" in done.err


def test_two_files_of_different_methods_add_up(tmp_path, capsys):
    base = tiny_models.saved("llama")
    files = [written(name, tmp_path / f"{name}.safetensors", base) for name in ("lora", "pissa")]
    done = inside(
        capsys, "merge", *files, "--into", base, "-o", tmp_path / "OUT", "--weight", 2, "--weight", 1
    )
    assert done.code == 0, done.err
    before, after = tensors_of(base), tensors_of(tmp_path / "OUT")
    one, two = (run_layers(name, file, base) for name, file in zip(("lora", "pissa"), files, strict=True))
    for module in MODULES:
        start = before[f"{module}.weight"].double()
        exact = start + 2 * (one[module][0] - start) + (two[module][0] - start)
        assert_close(after[f"{module}.weight"], exact)


# --- refusals and notes ---


@pytest.mark.parametrize("name", ["pissa", "antipasto-V", "lora", "hra"])
def test_a_file_is_merged_once(name, tmp_path, capsys):
    base = tiny_models.saved("llama")
    file = written(name, tmp_path / "adapter.safetensors", base)
    assert merged(capsys, file, base, tmp_path / "OUT").code == 0
    moved = file.rename(tmp_path / "moved.safetensors")
    other = written("ia3", tmp_path / "other.safetensors", base)
    assert merged(capsys, other, tmp_path / "OUT", tmp_path / "more").code == 0
    for place in ("OUT", "more"):
        again = merged(capsys, moved, tmp_path / place, tmp_path / "twice")
        assert (again.code, again.out) == (
            ExitCode.EXISTS,
            "",
        ) and "already contains this adapter" in again.err


@pytest.mark.parametrize(
    ("name", "said"),
    [("pissa", "recomputed from this base"), ("antipasto-V", "from its own tensors"), ("lora", None)],
)
def test_what_was_taken_off_the_base_is_said(name, said, tmp_path, capsys):
    base = tiny_models.saved("llama")
    file = written(name, tmp_path / "adapter.safetensors", base)
    notes = merged(capsys, file, base, tmp_path / "OUT", "--json").json["notes"]
    assert any(said in note for note in notes) if said else not notes


def test_a_base_that_lost_the_start_already_is_refused(tmp_path, capsys):
    """The manifest of the base says so: a second, different initialisation would be subtracted."""
    base = tiny_models.saved("llama")
    file = written("pissa", tmp_path / "pissa.safetensors", base)
    other = written("lora", tmp_path / "lora.safetensors", base)
    residual = tmp_path / "residual"
    tiny_models.save("llama", residual)
    records = {f"{module}.weight": {"role": "residual"} for module in MODULES}
    made_by = {
        "schema": manifest.SCHEMA,
        "command": "init",
        **{section: {} for section in manifest.SECTIONS},
        "tensors": records,
    }
    (residual / "kasa.manifest.json").write_bytes(manifest.seal(made_by))
    done = merged(capsys, file, residual, tmp_path / "OUT")
    assert (done.code, done.out) == (ExitCode.INVALID, "")
    assert "subtracted from this base already" in done.err and not (tmp_path / "OUT").exists()
    done = inside(capsys, "convert", file, "--to", "lora", "--base", residual, "-o", tmp_path / "OUT")
    assert done.code == ExitCode.INVALID and "subtracted from this base already" in done.err
    assert merged(capsys, other, residual, tmp_path / "OUT").code == 0


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"variant": "vera"}, "vera"),
        ({"variant": ...}, "variant"),
        ({"dropout": 0.1}, "dropout"),
        ({"use_rslora": True}, "use_rslora"),
        ({"alpha": ...}, "alpha"),
        ({"alpha": "six"}, "alpha"),
        ({"r": 5}, "lora_A"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(config, said, tmp_path, capsys):
    base = tiny_models.saved("llama")
    file = written("lora", tmp_path / "adapter.safetensors", base, **config)
    done = merged(capsys, file, base, tmp_path / "OUT")
    assert (done.code, done.out) == (ExitCode.INVALID, "")
    assert said in done.err and done.err.count("\n") == 1 and not (tmp_path / "OUT").exists()


def test_a_tensor_of_another_method_is_refused_by_name(tmp_path, capsys):
    base = tiny_models.saved("llama")
    file = written("dora", tmp_path / "adapter.safetensors", base, variant="lora")
    done = merged(capsys, file, base, tmp_path / "OUT")
    assert done.code == ExitCode.INVALID and "lora_m" in done.err
