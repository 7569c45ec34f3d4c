"""Every kind of adapter against PEFT's own merge, or against an independent implementation of its formula."""

import copy
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kasa_cli.adapters.config import kind_of
from kasa_cli.errors import InvalidInput, NumericalError, UsageError
from kasa_cli.linalg import rounding
from kasa_cli.linalg.bottom import ends
from kasa_cli.methods.adapter_kinds import change as change_file
from kasa_cli.methods.adapter_kinds.change import Change, apply, apply_bias, factors, rows, weighted
from kasa_cli.methods.adapter_kinds.kind import Module
from kasa_cli.methods.adapter_kinds.lora import truncation
from kasa_cli.methods.adapter_kinds.lora_experts import experts
from kasa_cli.methods.adapter_kinds.table import KINDS, PEFT_TYPES, REFUSED, change_by_kind
from tests.builders.matrices import gaussian

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`"),
    pytest.mark.filterwarnings(
        "ignore:Adapter 'default'. 1 LoRA tensor.s. have invalid shape. .*lora_B.bias"
    ),
]

R = 4
EXACT = 1e-6
"""Relative to the largest entry, against PEFT in float32."""
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "tall": lambda: nn.Linear(24, 40),
    "wide": lambda: nn.Linear(40, 24, bias=False),
    "square": lambda: nn.Linear(32, 32),
    "conv1d": lambda: Conv1D(40, 24),
    "embedding": lambda: nn.Embedding(56, 24),
}
LINEAR = ("tall", "wide", "square")
DENSE = (*LINEAR, "conv1d")
ALL = (*DENSE, "embedding")


@dataclass(frozen=True)
class Row:
    """A kind as PEFT has it. `resolved` are settings that PEFT's configuration has under another name.

    `exact` is looser where PEFT's own float32 decomposition is: see `test_what_is_found_from_the_weight_is_exact`.
    `is_float32_inside`: PEFT works in float32 somewhere, though weight and adapter be float64.
    """

    kind: str
    make: type[peft.PeftConfig]
    config: Mapping[str, Any]
    layers: Sequence[str]
    resolved: Mapping[str, Any] = field(default_factory=dict)
    exact: float = EXACT
    is_float32_inside: bool = False


LORA = {"r": R, "lora_alpha": 10}
ADALORA = {"init_r": R, "target_r": 2, "lora_alpha": 10, "total_step": 9}
ROWS: dict[str, Row] = {
    "lora": Row("lora", peft.LoraConfig, LORA, ALL),
    "rslora": Row("lora", peft.LoraConfig, {**LORA, "use_rslora": True}, ALL),
    "lora-bias": Row("lora", peft.LoraConfig, {**LORA, "lora_bias": True}, ("tall", "square", "conv1d")),
    "mica": Row("lora", peft.LoraConfig, {**LORA, "init_lora_weights": "mica"}, (*LINEAR, "embedding")),
    "orthogonal": Row("lora", peft.LoraConfig, {**LORA, "init_lora_weights": "orthogonal"}, LINEAR),
    "kasa": Row(
        "kasa",
        peft.LoraConfig,
        {**LORA, "kasa_config": peft.KasaConfig()},
        LINEAR,
        exact=4e-6,
        is_float32_inside=True,
    ),
    "kasa-rslora": Row(
        "kasa",
        peft.LoraConfig,
        {**LORA, "use_rslora": True, "kasa_config": peft.KasaConfig()},
        LINEAR,
        exact=4e-6,
        is_float32_inside=True,
    ),
    "pissa": Row("pissa", peft.LoraConfig, {**LORA, "init_lora_weights": "pissa"}, ALL, exact=4e-6),
    "pissa-rslora": Row(
        "pissa", peft.LoraConfig, {**LORA, "use_rslora": True, "init_lora_weights": "pissa"}, DENSE
    ),
    "olora": Row("olora", peft.LoraConfig, {**LORA, "init_lora_weights": "olora"}, (*LINEAR, "embedding")),
    "dora": Row("dora", peft.LoraConfig, {**LORA, "use_dora": True}, ALL),
    "dora-pissa": Row(
        "dora", peft.LoraConfig, {**LORA, "use_dora": True, "init_lora_weights": "pissa"}, ALL, exact=4e-6
    ),
    "adalora": Row("adalora", peft.AdaLoraConfig, ADALORA, DENSE, {"r": R}),
    "adalora-no-alpha": Row("adalora", peft.AdaLoraConfig, {**ADALORA, "lora_alpha": 0}, ("tall",), {"r": R}),
    "delora": Row("delora", peft.DeloraConfig, {"r": R}, LINEAR),
    "vera": Row("vera", peft.VeraConfig, {"r": R}, DENSE),
    "randlora": Row(
        "randlora", peft.RandLoraConfig, {"r": R, "randlora_alpha": 10, "save_projection": True}, DENSE
    ),
    "randlora-uneven": Row(
        "randlora", peft.RandLoraConfig, {"r": 7, "randlora_alpha": 10, "save_projection": True}, DENSE
    ),
    "osf": Row("osf", peft.OSFConfig, {"effective_rank": 9}, LINEAR, exact=1e-5, is_float32_inside=True),
    "ia3": Row("ia3", peft.IA3Config, {"feedforward_modules": []}, DENSE),
    "ia3-feedforward": Row("ia3", peft.IA3Config, {"feedforward_modules": ["x"]}, DENSE),
    "hra": Row("hra", peft.HRAConfig, {"r": R}, LINEAR),
    "hra-gram-schmidt": Row("hra", peft.HRAConfig, {"r": R, "apply_GS": True}, LINEAR),
    "oft": Row("oft", peft.OFTConfig, {"r": 0, "oft_block_size": 4}, (*LINEAR, "embedding")),
    "oft-3-terms": Row(
        "oft", peft.OFTConfig, {"r": 0, "oft_block_size": 8, "num_cayley_neumann_terms": 3}, LINEAR
    ),
    "oft-4-terms": Row(
        "oft", peft.OFTConfig, {"r": 0, "oft_block_size": 8, "num_cayley_neumann_terms": 4}, LINEAR
    ),
    "oft-7-terms": Row(
        "oft", peft.OFTConfig, {"r": 0, "oft_block_size": 8, "num_cayley_neumann_terms": 7}, LINEAR
    ),
    "oft-2-terms": Row(
        "oft", peft.OFTConfig, {"r": 0, "oft_block_size": 8, "num_cayley_neumann_terms": 2}, LINEAR
    ),
    "oft-cayley": Row(
        "oft",
        peft.OFTConfig,
        {"r": 0, "oft_block_size": 4, "use_cayley_neumann": False},
        (*LINEAR, "embedding"),
    ),
    "oft-shared": Row(
        "oft", peft.OFTConfig, {"r": 0, "oft_block_size": 4, "block_share": True}, (*LINEAR, "embedding")
    ),
    "coft": Row(
        "oft",
        peft.OFTConfig,
        {"r": 0, "oft_block_size": 4, "coft": True, "eps": 3.8},
        LINEAR,
        is_float32_inside=True,
    ),
    "coft-tight": Row(
        "oft",
        peft.OFTConfig,
        {"r": 0, "oft_block_size": 4, "coft": True, "eps": 3e-2},
        (*LINEAR, "embedding"),
        is_float32_inside=True,
    ),
    "road-1": Row("road", peft.RoadConfig, {"variant": "road_1", "group_size": 8}, LINEAR),
    "road-2": Row("road", peft.RoadConfig, {"variant": "road_2", "group_size": 8}, LINEAR),
    "road-4": Row("road", peft.RoadConfig, {"variant": "road_4", "group_size": 8}, LINEAR),
    "hira": Row("hira", peft.HiraConfig, {"r": R}, ALL),
    "loha": Row("loha", peft.LoHaConfig, {"r": R, "alpha": 10}, LINEAR),
    "lokr": Row("lokr", peft.LoKrConfig, {"r": R, "alpha": 10}, LINEAR),
    "lokr-w2-product": Row("lokr", peft.LoKrConfig, {"r": 2, "alpha": 10}, LINEAR),
    "lokr-both-products": Row("lokr", peft.LoKrConfig, {"r": 1, "alpha": 10, "decompose_both": True}, LINEAR),
    "lokr-factor": Row("lokr", peft.LoKrConfig, {"r": 2, "alpha": 10, "decompose_factor": 8}, LINEAR),
    "miss": Row("miss", peft.MissConfig, {"r": R}, LINEAR),
    "miss-remainder": Row("miss", peft.MissConfig, {"r": 7}, LINEAR),
    "miss-random": Row("miss", peft.MissConfig, {"r": R, "init_weights": False}, LINEAR),
    "miss-mini": Row("miss", peft.MissConfig, {"r": R, "init_weights": "mini", "mini_r": 8}, LINEAR),
    "miss-bat": Row("miss", peft.MissConfig, {"r": R, "init_weights": "bat"}, LINEAR),
}
FROM_WEIGHT = re.compile(r"base_layer|_osf_")
"""Parameters of PEFT's layer that come from the weight itself."""
CASES = [
    pytest.param(name, layer, id=f"{name}-{layer}") for name, row in ROWS.items() for layer in row.layers
]


@dataclass(frozen=True)
class Run:
    """A layer before, the adapter as PEFT saves it, and the layer after PEFT's merge."""

    W: Tensor
    bias: Tensor | None
    tensors: dict[str, Tensor]
    module: Module
    merged: Tensor
    merged_bias: Tensor | None
    state: dict[str, Tensor]


def weight_of(layer: nn.Module) -> Tensor:
    """W as it multiplies, out x in."""
    stored = layer.weight.detach()
    return stored.T if isinstance(layer, Conv1D | nn.Embedding) else stored


def bias_of(layer: nn.Module) -> Tensor | None:
    bias = getattr(layer, "bias", None)
    return None if bias is None else bias.detach().clone()


def config_of(row: Row, layer: str, **more: Any) -> peft.PeftConfig:
    is_odd = layer == "conv1d" and "fan_in_fan_out" in row.make.__dataclass_fields__
    return row.make(
        target_modules=["x"], **row.config, **({"fan_in_fan_out": True} if is_odd else {}), **more
    )


def base_of(layer: str, dtype: torch.dtype) -> nn.Module:
    model = nn.Sequential()
    torch.manual_seed(7)
    model.add_module("x", LAYERS[layer]())
    for number, parameter in enumerate(model.parameters()):
        parameter.data = 0.3 * gaussian(
            *parameter.shape, *(() if parameter.ndim > 1 else (1,)), seed=number
        ).reshape(parameter.shape)
    return model.to(torch.bfloat16).to(dtype) if dtype != torch.float32 else model.to(dtype)


def own(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters of the adapter, by name."""
    return {
        name: value
        for name, value in model.named_parameters()
        if "base_layer" not in name and "ranknum" not in name
    }


def fill(model: nn.Module) -> None:
    """Give every parameter of the adapter nonzero values that differ from its initialisation."""
    for number, value in enumerate(own(model).values()):
        value.data = 0.4 * torch.randn(value.shape, generator=torch.Generator().manual_seed(100 + number)).to(
            value
        )


def saved(model: nn.Module, module: str = "x", **options: Any) -> dict[str, Tensor]:
    """The tensors of the module by their short names, and those that all modules share."""
    prefix = f"base_model.model.{module}."
    state = peft.get_peft_model_state_dict(model, **options)
    names = {name: name.removeprefix(prefix).removeprefix("base_model.") for name in state}
    return {
        short if short.startswith("oft") else short.removesuffix(".weight"): state[name].clone()
        for name, short in names.items()
    }


def resolved(config: peft.PeftConfig, more: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in the form in which the reader of configurations passes them."""
    settings = config.to_dict()
    alpha = next((settings[name] for name in ("lora_alpha", "randlora_alpha") if name in settings), None)
    return {**settings, **({} if alpha is None else {"alpha": alpha}), **more}


def run(
    name: str, layer: str, dtype: torch.dtype = torch.float32, adapter: Mapping[str, Tensor] | None = None
) -> Run:
    row, base = ROWS[name], base_of(layer, dtype)
    W, bias = weight_of(base.x).clone(memory_format=torch.preserve_format), bias_of(base.x)
    config = config_of(row, layer)
    model = peft.get_peft_model(base, config)
    fill(model)
    if adapter is not None:
        model.load_state_dict(dict(adapter), strict=False)
    tensors = saved(model)
    state = {key: value.clone() for key, value in model.state_dict().items() if not FROM_WEIGHT.search(key)}
    settings = resolved(config, row.resolved)
    after = model.merge_and_unload().x
    module = Module(*W.shape, settings, is_transposed=layer in ("conv1d", "embedding"))
    return Run(W, bias, tensors, module, weight_of(after), bias_of(after), state)


def changes_of(name: str, done: Run) -> list[Change]:
    kind = ROWS[name].kind
    first = [truncation(ends(done.W, R))] if kind == "kasa" else []
    weight = done.W if KINDS[kind].needs_weight else None
    return [*first, change_by_kind(kind, done.tensors, done.module, weight)]


def off(found: Tensor, wanted: Tensor) -> float:
    """The largest error, relative to the largest entry."""
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of as few rows as possible."""
    monkeypatch.setattr(rounding, "BLOCK_BYTES", 1)
    monkeypatch.setattr(change_file, "LEAST_ROWS", 1)


@pytest.mark.parametrize(("name", "layer"), CASES)
@pytest.mark.usefixtures("small_blocks")
def test_a_merge_is_that_of_peft(name, layer):
    done = run(name, layer)
    changes = changes_of(name, done)
    merged = apply(done.W, changes, torch.float32)
    assert off(merged, done.merged) <= ROWS[name].exact
    assert off(done.merged, done.W) > 1e-2
    assert merged.stride() == done.W.stride()
    if done.bias is not None:
        assert off(apply_bias(done.bias, changes, torch.float32), done.merged_bias) <= EXACT


def in_double(name: str, layer: str, state: Mapping[str, Tensor]) -> Tensor | None:
    """PEFT's merge of the same numbers in float64, for kinds that PEFT computes in float64."""
    try:
        return run(name, layer, torch.float64, state).merged
    except TypeError:  # PiSSA, OLoRA and MiCA do not accept float64
        return None


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_in_bfloat16_one_rounding_is_closer_to_the_sum_than_peft(name, layer):
    done = run(name, layer, torch.bfloat16)
    changes = changes_of(name, done)
    exact = apply(done.W, changes, torch.float64)
    by_peft = in_double(name, layer, done.state)
    if by_peft is not None:
        assert off(exact, by_peft) <= (ROWS[name].exact if ROWS[name].is_float32_inside else 1e-14)
    merged = apply(done.W, changes, torch.bfloat16).double()
    theirs = done.merged.double()
    assert (merged - exact).norm() <= (theirs - exact).norm()
    assert ((merged - exact).abs() <= (theirs - exact).abs()).all()


def svd(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(W.double(), full_matrices=False)


def kasa_formula(W: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    U, S, Vh = svd(W)
    return (U[:, :-R] * S[:-R]) @ Vh[:-R] + 2.5 * t["lora_B"] @ torch.diag(t["lora_diag"]) @ t["lora_A"]


def pissa_formula(W: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    U, S, Vh = svd(W)
    return (U[:, R:] * S[R:]) @ Vh[R:] + 2.5 * t["lora_B"] @ t["lora_A"]


def olora_formula(W: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    Q, U = torch.linalg.qr(W.double())
    return W.double() + 2.5 * (t["lora_B"] @ t["lora_A"] - Q[:, :R] @ U[:R])


def osf_formula(W: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    U, S, Vh = svd(W)
    U_low, S_low, V_low = (t[f"osf_svd_params.{letter}_low"] for letter in "USV")
    return (U[:, :9] * S[:9]) @ Vh[:9] + U_low @ torch.diag(S_low) @ V_low


def dora_pissa_formula(W: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    V = pissa_formula(W, t)
    return torch.diag(t["lora_magnitude_vector"] / V.norm(dim=1)) @ V


FORMULAS = {
    "kasa": kasa_formula,
    "pissa": pissa_formula,
    "olora": olora_formula,
    "osf": osf_formula,
    "dora-pissa": dora_pissa_formula,
}


@pytest.mark.parametrize("layer", LINEAR)
@pytest.mark.parametrize("name", FORMULAS)
def test_what_is_found_from_the_weight_is_exact(name, layer):
    done = run(name, layer)
    wanted = FORMULAS[name](done.W, {key: value.double() for key, value in done.tensors.items()})
    assert off(apply(done.W, changes_of(name, done), torch.float64), wanted) <= 1e-11


def test_a_first_form_of_kasa_with_a_whole_core():
    done = run("kasa", "tall")
    core = gaussian(R, R)
    found = change_by_kind("kasa", {**done.tensors, "lora_diag": core}, done.module)
    (term,) = found.terms
    A, B = done.tensors["lora_A"].double(), done.tensors["lora_B"].double()
    assert off(term.L @ term.R, 2.5 * B @ core @ A) <= 1e-14


def test_an_osf_that_trained_no_component_is_refused():
    tensors = {f"osf_svd_params.{name}": value for name, value in
               {"U_low": torch.ones(8, 0), "S_low": torch.ones(0), "V_low": torch.ones(0, 6)}.items()}  # fmt: skip
    with pytest.raises(InvalidInput, match="k is 0: osf_svd_params"):
        change_by_kind("osf", tensors, Module(8, 6), gaussian(8, 6))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_where_the_start_is_not_unique_it_is_not_guessed(init):
    W = torch.eye(12)
    W[:, 1] = W[:, 0]
    settings = {"r": 2, "alpha": 4}
    tensors = {"lora_A": torch.ones(2, 12), "lora_B": torch.ones(12, 2)}
    with pytest.raises(NumericalError, match="not known"):
        change_by_kind(init, tensors, Module(12, 12, settings), W)


class Experts(nn.Module):
    """Fused experts as transformers has them in memory."""

    def __init__(self, shape: tuple[int, int, int], *, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.w = nn.Parameter(0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("shape", [(3, 10, 6), (3, 6, 10), (5, 8, 8), (2, 10, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_are_merged_one_by_one_as_peft_merges_them_at_once(shape, is_transposed, use_rslora, dtype):
    base = nn.Sequential()
    base.add_module("x", Experts(shape, is_transposed=is_transposed))
    base.to(dtype)
    before = base.x.w.detach().clone()
    config = peft.LoraConfig(
        r=R, lora_alpha=10, use_rslora=use_rslora, target_modules=[], target_parameters=["x.w"]
    )
    model = peft.get_peft_model(base, config)
    fill(model)
    tensors = saved(model)
    after = model.merge_and_unload().x.w.detach()
    each = before.transpose(1, 2) if is_transposed else before
    module = Module(*each.shape[1:], resolved(config, {}), is_transposed=is_transposed)
    found = experts(tensors, module, len(each), "0.21.2")
    merged = torch.stack([apply(W, [one], dtype) for W, one in zip(each, found, strict=True)])
    after = after.transpose(1, 2) if is_transposed else after
    if dtype == torch.float32:
        assert off(merged, after) <= EXACT
    exact = torch.stack([apply(W, [one], torch.float64) for W, one in zip(each, found, strict=True)])
    assert (merged.double() - exact).norm() <= (after.double() - exact).norm()
    assert off(after, before.transpose(1, 2) if is_transposed else before) > 1e-2


@pytest.mark.parametrize(("o", "i"), [(10, 6), (8, 8)])
def test_files_of_peft_before_0_19_have_the_sides_of_experts_swapped(o, i):
    A, B = gaussian(3 * R, o, seed=1), gaussian(i, R * 3, seed=2)
    delta = torch.einsum("o r e, e r i -> e i o", B.reshape(i, R, 3), A.reshape(3, R, o))
    found = experts({"lora_A": A, "lora_B": B}, Module(o, i, {"r": R, "alpha": 10}), 3, "0.18.1")
    for one, wanted in zip(found, delta, strict=True):
        (term,) = one.terms
        assert off(term.L @ term.R, 2.5 * wanted) <= 1e-14


def test_experts_that_do_not_fit_are_named():
    module = Module(10, 6, {"r": R, "alpha": 10})
    with pytest.raises(InvalidInput, match=r"12 rows for 4 experts of rank 4: lora_A"):
        experts({"lora_A": gaussian(12, 6), "lora_B": gaussian(10, 12)}, module, 4, "0.21.2")
    with pytest.raises(InvalidInput, match=r"a matrix is missing: lora_B"):
        experts({"lora_A": gaussian(12, 6)}, module, 3, "0.21.2")
    with pytest.raises(InvalidInput, match=r"shape \[12, 7\], expected \(n, i = 6\): lora_A"):
        experts({"lora_A": gaussian(12, 7), "lora_B": gaussian(10, 12)}, module, 3, "0.21.2")
    with pytest.raises(InvalidInput, match="peft_version"):
        experts({"lora_A": gaussian(12, 6), "lora_B": gaussian(6, 12)},
                Module(6, 6, {"r": R, "alpha": 10}), 3, "")  # fmt: skip


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match any targeted module")
def test_a_pruned_adalora_is_still_divided_by_the_rank_it_began_with():
    kept = [True, False, True, False, False, True]
    settings = {**ADALORA, "init_r": 6, "rank_pattern": {"x.lora_E": kept}}
    trained = peft.get_peft_model(
        base_of("tall", torch.float32), peft.AdaLoraConfig(target_modules=["x"], **settings)
    )
    fill(trained)
    tensors = saved(trained)
    assert tensors["lora_A"].shape == (3, 24)
    base = base_of("tall", torch.float32)
    W = weight_of(base.x).clone()
    config = peft.AdaLoraConfig(target_modules=["x"], **settings)
    loaded = peft.get_peft_model(base, config)
    peft.set_peft_model_state_dict(
        loaded, {f"base_model.model.x.{key}": value for key, value in tensors.items()}
    )
    wanted = weight_of(loaded.merge_and_unload().x)
    found = change_by_kind("adalora", tensors, Module(40, 24, {"r": 6, "alpha": 10}))
    assert off(apply(W, [found], torch.float32), wanted) <= EXACT


SEVERAL = {
    "lora-then-dora": ("lora", "dora"),
    "dora-then-lora": ("dora", "lora"),
    "dora-twice": ("dora", "dora"),
    "kasa-twice": ("kasa", "kasa"),
    "hira-twice": ("hira", "hira"),
    "ia3-twice": ("ia3", "ia3-feedforward"),
}


@pytest.mark.parametrize("names", SEVERAL.values(), ids=SEVERAL)
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_several_adapters_are_merged_in_turn_as_in_peft(names):
    base = base_of("square", torch.float32)
    W, bias = weight_of(base.x).clone(), bias_of(base.x)
    ranks = {"r": 6} if "r" in ROWS[names[1]].config else {}
    configs = [config_of(ROWS[name], "square") for name in names]
    for key, value in ranks.items():
        setattr(configs[1], key, value)
    model = peft.get_peft_model(base, configs[0], adapter_name="0")
    model.add_adapter("1", configs[1])
    fill(model)
    changes = [truncation(ends(W, 6))] if "kasa" in names else []
    for number, (name, config) in enumerate(zip(names, configs, strict=True)):
        tensors = saved(model, adapter_name=str(number))
        module = Module(*W.shape, resolved(config, {}))
        changes.append(change_by_kind(ROWS[name].kind, tensors, module, W))
    after = model.merge_and_unload(adapter_names=["0", "1"]).x
    assert off(apply(W, changes, torch.float32), weight_of(after)) <= 4e-6
    assert off(apply_bias(bias, changes, torch.float32), bias_of(after)) <= EXACT


@pytest.mark.parametrize(
    "name", ["lora", "lora-bias", "pissa", "kasa", "loha", "lokr", "hira", "miss", "osf", "vera"]
)
def test_a_weight_scales_what_is_added(name):
    done = run(name, "tall")
    found = changes_of(name, done)[-1]
    once, half = (rows(done.W, [weighted(found, weight)], 0, 40) for weight in (1, -0.5))
    W = done.W.double()
    assert off(half, W - 0.5 * (once - W)) <= 1e-14
    if found.shift is not None:
        bias = done.bias.double()
        once, half = (apply_bias(bias, [weighted(found, weight)], torch.float64) for weight in (1, -0.5))
        assert off(half, bias - 0.5 * (once - bias)) <= 1e-14


@pytest.mark.parametrize("name", ["dora", "ia3", "hra", "oft", "road-1", "miss-bat"])
def test_what_multiplies_cannot_be_weighted(name):
    (found,) = changes_of(name, run(name, "tall"))
    assert weighted(found, 1.0) is found
    with pytest.raises(UsageError, match="leave its weight at 1"):
        weighted(found, 0.5)


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_weight_is_a_number(weight):
    with pytest.raises(UsageError, match="cannot weight"):
        weighted(Change(), weight)


def test_terms_alone_are_one_term_for_any_rounding():
    first, second = run("kasa", "tall"), run("lora", "tall")
    changes = [*changes_of("kasa", first), *changes_of("lora", second)]
    found = factors(changes)
    target = rounding.ExactSum(first.W, found.L, found.R)
    assert off(target.rows(0, 40), rows(first.W, changes, 0, 40)) <= 1e-14
    for name in ("dora", "loha", "ia3"):
        assert factors([*changes, *changes_of(name, run(name, "tall"))]) is None
    assert factors([]) is None


@pytest.mark.parametrize("name", ROWS)
def test_the_size_of_blocks_changes_nothing(name, monkeypatch):
    layer = ROWS[name].layers[0]
    done = run(name, layer)
    changes = changes_of(name, done)
    at_once = apply(done.W, changes, torch.float64)
    monkeypatch.setattr(rounding, "BLOCK_BYTES", 1)
    monkeypatch.setattr(change_file, "LEAST_ROWS", 1)
    assert len(list(change_file.row_blocks(done.W.shape, changes))) > 1
    assert off(apply(done.W, changes, torch.float64), at_once) <= 1e-14


def test_nothing_given_is_changed():
    for name in ROWS:
        done = run(name, ROWS[name].layers[0])
        before = copy.deepcopy((done.W, done.tensors))
        apply(done.W, changes_of(name, done), torch.float32)
        assert torch.equal(before[0], done.W), name
        assert all(torch.equal(before[1][key], done.tensors[key]) for key in done.tensors), name


Tensors = dict[str, Tensor]
NUM_OUT, NUM_IN = 24, 32


def lite(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return 0.4 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def lite_factors(dtype: torch.dtype = torch.float32) -> Tensors:
    return {"lora_A": lite(R, NUM_IN, seed=1, dtype=dtype), "lora_B": lite(NUM_OUT, R, seed=2, dtype=dtype)}


def lite_lora(W: Tensor, t: Tensors) -> Tensor:
    return W + 2.5 * t["lora_B"] @ t["lora_A"]


def lite_pissa(dtype: torch.dtype) -> Callable[[Tensor, Tensors], Tensor]:
    """The initialisation is rounded to the dtype of the file before it is subtracted from the base."""

    def merged(W: Tensor, t: Tensors) -> Tensor:
        U, S, Vh = torch.linalg.svd(W.float(), full_matrices=False)
        root = torch.diag((S[:R] / 2.5).sqrt())
        B, A = (U[:, :R] @ root).to(dtype), (root @ Vh[:R]).to(dtype)
        return W - 2.5 * B.double() @ A.double() + 2.5 * t["lora_B"] @ t["lora_A"]

    return merged


def lite_dora(W: Tensor, t: Tensors) -> Tensor:
    V = lite_lora(W, t)
    return torch.stack([m * v / v.norm() for m, v in zip(t["lora_m"], V, strict=True)])


def lite_delora(W: Tensor, t: Tensors) -> Tensor:
    A, B = t["lora_A"], t["lora_B"]
    sizes = [max(float(a.norm()), 1e-4) * max(float(b.norm()), 1e-4) for a, b in zip(A, B.T, strict=True)]
    terms = [torch.outer(b, a * t["lora_wnorm"]) / size for a, b, size in zip(A, B.T, sizes, strict=True)]
    return W + t["lora_lambda"] / R * sum(terms)


def lite_hra(W: Tensor, t: Tensors) -> Tensor:
    for u in t["lora_U"]:
        W = W @ (torch.eye(NUM_IN, dtype=W.dtype) - 2 * torch.outer(u, u) / max(float(u @ u), 1e-12))
    return W


def turns(angles: Tensor, limit: float) -> Tensor:
    """AntiPaSTO's rotation of one block of four, entry by entry."""
    a, b, c, d, e, f = (limit * math.tanh(float(x) / 2 / limit) / 2 for x in angles)
    X = torch.tensor([[0, a, b, c], [-a, 0, d, e], [-b, -d, 0, f], [-c, -e, -f, 0]], dtype=torch.float64)
    eye = torch.eye(4, dtype=torch.float64)
    return torch.linalg.inv(eye - X) @ (eye + X)


def lite_antipasto(basis: str) -> Callable[[Tensor, Tensors], Tensor]:
    def merged(W: Tensor, t: Tensors) -> Tensor:
        U, S, Vh = t["lora_U"], t["lora_S"], t["lora_Vh"]
        turn = torch.block_diag(*(turns(row, 2 * math.tan(0.25)) for row in t.get("lora_rot_T", ())))
        left, right = (
            {"V": (U, turn @ Vh), "U": (U @ turn.T, Vh), "none": (U, Vh)}[basis] if len(t) > 4 else (U, Vh)
        )
        return W - U @ torch.diag(S) @ Vh + left @ torch.diag(S + t["lora_delta_s"]) @ right

    return merged


def lite_road(variant: int) -> Callable[[Tensor, Tensors], Tensor]:
    """R entry by entry, in groups of 8: each output is paired with the output 4 places away in its group."""

    def merged(W: Tensor, t: Tensors) -> Tensor:
        theta, alpha = t["lora_road_theta"], t["lora_road_alpha"]
        turn = torch.zeros(NUM_OUT, NUM_OUT, dtype=torch.float64)
        for row in range(NUM_OUT):
            group, place = divmod(row, 8)
            along, across = {
                1: (group * 4 + place % 4,) * 2,
                2: (row, row),
                4: (group * 16 + place, group * 16 + 8 + place),
            }[variant]
            turn[row, row] = alpha[along] * theta[along].cos()
            partner = row + 4 if place < 4 else row - 4
            turn[row, partner] = (-1 if place < 4 else 1) * alpha[across] * theta[across].sin()
        return turn @ W

    return merged


def road_tensors(size: int) -> Tensors:
    return {"lora_road_theta": lite(size, seed=1), "lora_road_alpha": 1 + lite(size, seed=2)}


def antipasto_tensors(num_blocks: int) -> Tensors:
    turn = {"lora_rot_T": lite(num_blocks, 6, seed=5)} if num_blocks else {}
    found = {
        "lora_U": lite(NUM_OUT, 8, seed=1),
        "lora_S": lite(8, seed=2),
        "lora_Vh": lite(8, NUM_IN, seed=3),
    }
    return {**found, "lora_delta_s": lite(8, seed=4), **turn}


BASED = {"r": R, "alpha": 10}
DELORA = {**lite_factors(), "lora_lambda": torch.tensor(1.7), "lora_wnorm": lite(NUM_IN, seed=3)}
SHORT = {**DELORA, "lora_A": torch.cat([DELORA["lora_A"][:3], torch.full((1, NUM_IN), 1e-7)])}
NEARLY_ZERO = lite(R, NUM_IN, seed=1) * torch.tensor([[1.0], [0], [1e-8], [1]])
THIN = {**DELORA, "lora_B": torch.cat([DELORA["lora_B"][:, :3], torch.full((NUM_OUT, 1), 1e-7)], dim=1)}
LITE: dict[str, tuple[str, Tensors, dict[str, Any], Callable[[Tensor, Tensors], Tensor]]] = {
    "lora": ("lite-lora", lite_factors(), BASED, lite_lora),
    "eva": ("lite-lora", lite_factors(torch.bfloat16), BASED, lite_lora),
    "pissa": ("lite-pissa", lite_factors(), BASED, lite_pissa(torch.float32)),
    "pissa-bf16": ("lite-pissa", lite_factors(torch.bfloat16), BASED, lite_pissa(torch.bfloat16)),
    "dora": ("lite-dora", {**lite_factors(), "lora_m": lite(NUM_OUT, seed=3)}, BASED, lite_dora),
    "delora": ("lite-delora", DELORA, {"r": R}, lite_delora),
    "delora-short": ("lite-delora", SHORT, {"r": R}, lite_delora),
    "delora-thin": ("lite-delora", THIN, {"r": R}, lite_delora),
    "hra": ("lite-hra", {"lora_U": lite(R, NUM_IN, seed=1)}, {"r": R}, lite_hra),
    "hra-pairs": ("lite-hra", {"lora_U": lite(2, NUM_IN, seed=1).repeat_interleave(2, 0)}, {"r": R}, lite_hra),
    "hra-zero": ("lite-hra", {"lora_U": NEARLY_ZERO}, {"r": R}, lite_hra),
    "ia3": ("lite-ia3", {"lora_g": lite(NUM_OUT, seed=1)}, {}, lambda W, t: torch.diag(t["lora_g"]) @ W),
    "ia3_ff": ("lite-ia3_ff", {"lora_g": lite(NUM_IN, seed=1)}, {}, lambda W, t: W @ torch.diag(t["lora_g"])),
    "road-1": ("lite-road", road_tensors(NUM_OUT // 2), {"road_variant": "road_1", "group_size": 8}, lite_road(1)),
    "road-2": ("lite-road", road_tensors(NUM_OUT), {"road_variant": "road_2", "group_size": 8}, lite_road(2)),
    "road-4": ("lite-road", road_tensors(NUM_OUT * 2), {"road_variant": "road_4", "group_size": 8}, lite_road(4)),
    "antipasto": ("lite-antipasto", antipasto_tensors(2), {"r": 8}, lite_antipasto("V")),
    "antipasto-U": ("lite-antipasto", antipasto_tensors(2), {"r": 8, "rotate_basis": "U"}, lite_antipasto("U")),
    "antipasto-none": (
        "lite-antipasto", antipasto_tensors(0), {"r": 8, "rotate_basis": "none"}, lite_antipasto("none"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LITE.values(), ids=LITE)
@pytest.mark.usefixtures("small_blocks")
def test_what_lora_lite_writes_is_merged_by_its_formula(case):
    kind, tensors, settings, formula = case
    W = gaussian(NUM_OUT, NUM_IN, torch.float32)
    weight = W if KINDS[kind].needs_weight else None
    found = change_by_kind(kind, tensors, Module(NUM_OUT, NUM_IN, settings), weight)
    wanted = formula(W.double(), {name: value.double() for name, value in tensors.items()})
    assert off(apply(W, [found], torch.float64), wanted) <= 1e-12
    assert kind == "lite-hra" or off(wanted, W) > 1e-2


@pytest.mark.parametrize(
    ("kind", "is_moved"), [("ia3", True), ("ia3_ff", False), ("road-2", True), ("dora", False)]
)
def test_only_what_acts_on_the_output_moves_the_bias(kind, is_moved):
    name, tensors, settings, formula = LITE[kind]
    W, bias = gaussian(NUM_OUT, NUM_IN, torch.float32), gaussian(1, NUM_OUT)[0]
    found = change_by_kind(name, tensors, Module(NUM_OUT, NUM_IN, settings), W)
    moved = apply_bias(bias, [found], torch.float64)
    if is_moved:
        column = formula(bias[:, None], {name: value.double() for name, value in tensors.items()})
        assert off(moved, column[:, 0]) <= 1e-14
    else:
        assert torch.equal(moved, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_untrained_pissa_of_lora_lite_is_the_base(dtype):
    W = gaussian(NUM_OUT, NUM_IN, torch.float32)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = (S[:R] / 2.5).sqrt()
    tensors = {"lora_A": (root[:, None] * Vh[:R]).to(dtype), "lora_B": (U[:, :R] * root).to(dtype)}
    found = change_by_kind("lite-pissa", tensors, Module(NUM_OUT, NUM_IN, BASED), W)
    assert off(apply(W, [found], torch.float64), W) <= 1e-15


@pytest.mark.parametrize("name", ROWS)
def test_a_configuration_of_peft_names_its_kind(name, tmp_path):
    config_of(ROWS[name], "tall").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert kind_of(config, tmp_path).name == ROWS[name].kind


def test_every_type_of_peft_is_merged_or_refused_with_a_reason():
    """This fails when a release of PEFT has a new type of adapter."""
    known = PEFT_TYPES.keys() | REFUSED.keys()
    assert {one.value for one in peft.PeftType} - known == set()
    assert not PEFT_TYPES.keys() & REFUSED.keys()
    assert all(20 < len(reason) < 160 for reason in REFUSED.values())


def test_every_kind_has_its_case():
    changing = {name for name, kind in KINDS.items() if kind.tensors}
    assert {row.kind for row in ROWS.values()} | {case[0] for case in LITE.values()} == changing


def test_an_unknown_kind_is_told_the_known_ones():
    with pytest.raises(InvalidInput, match=r"unknown kind of adapter 'lora2': known: lora, dora"):
        change_by_kind("lora2", {}, Module(4, 4))


FREE = {"miss_block": (1, 2), "vera_A": (1,), "vera_B": (0,), "randlora_A": (1, 2), "randlora_B": (0, 1)}
"""Sides of tensors that may be longer than the module needs, or of which only the whole tensor is checked."""
OWN_CASES = [pytest.param(name, ROWS[name].layers[0], id=name) for name in ROWS]


@pytest.mark.parametrize(("name", "layer"), OWN_CASES)
def test_a_tensor_that_is_missing_unknown_or_wrong_is_named(name, layer):
    done = run(name, layer)
    kind, row = KINDS[ROWS[name].kind], ROWS[name]

    def attempt(tensors: Tensors) -> Change:
        return change_by_kind(row.kind, tensors, done.module, done.W)

    with pytest.raises(InvalidInput, match="does not have: lora_C"):
        attempt({**done.tensors, "lora_C": torch.ones(1)})
    optional = {name for spec in kind.tensors.values() if spec.is_optional for name in spec.names}
    for key, value in done.tensors.items():
        rest = {other: tensor for other, tensor in done.tensors.items() if other != key}
        if key not in optional or kind.groups:
            with pytest.raises(InvalidInput, match="missing"):
                attempt(rest)
        with pytest.raises(InvalidInput, match=re.escape(key)):
            attempt({**rest, key: value.to(torch.int32)})
        with pytest.raises(InvalidInput, match=rf"not finite: {re.escape(key)}"):
            attempt({**rest, key: torch.full_like(value, math.nan)})
        with pytest.raises(InvalidInput, match=re.escape(key)):
            attempt({**rest, key: value[None, None]})
        for side in set(range(value.ndim)) - set(FREE.get(key, ())):
            longer = torch.cat([value, value.narrow(side, 0, 1)], dim=side)
            with pytest.raises(InvalidInput):
                attempt({**rest, key: longer})


def test_a_block_of_no_columns_is_an_error():
    with pytest.raises(InvalidInput, match="q is 0: miss_block"):
        settings = {"r": 2, "init_weights": "mini", "mini_r": 2}
        change_by_kind("miss", {"miss_block": torch.zeros(2, 0)}, Module(6, 4, settings))


def test_the_same_tensor_under_two_names_is_an_error():
    done = run("lora", "tall")
    with pytest.raises(InvalidInput, match=r"the same tensor as lora_A: lora_embedding_A"):
        twice = {**done.tensors, "lora_embedding_A": done.tensors["lora_A"]}
        change_by_kind("lora", twice, done.module)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 1}, "a setting is missing: r"),
        ({"r": 4}, "a setting is missing: alpha"),
        ({"r": 0, "alpha": 1}, "0 is no value for a setting: r"),
        ({"r": True, "alpha": 1}, "True is no value for a setting: r"),
        ({"r": 4, "alpha": math.nan}, "nan is no value for a setting: alpha"),
        ({"r": 4, "alpha": "1"}, "'1' is no value for a setting: alpha"),
        ({"r": 4, "alpha": 1, "use_rslora": 1}, "1 is no value for a setting: use_rslora"),
        ({"r": 5, "alpha": 1}, r"shape \[4, 24\], expected \(r = 5, i = 24\): lora_A"),
    ],
)
def test_a_setting_that_is_missing_or_wrong_is_named(settings, message):
    done = run("lora", "tall")
    with pytest.raises(InvalidInput, match=message):
        change_by_kind("lora", done.tensors, Module(40, 24, settings))


def test_a_weight_that_is_needed_or_does_not_fit_is_an_error():
    done = run("dora", "tall")
    with pytest.raises(InvalidInput, match="needs the weight under it"):
        change_by_kind("dora", done.tensors, done.module)
    with pytest.raises(InvalidInput, match="shape"):
        change_by_kind("dora", done.tensors, done.module, done.W.T)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("road-1", {"variant": "road_3"}), ("road-1", {"group_size": 16}), ("road-1", {"variant": "road_2"})],
)
def test_settings_that_do_not_fit_the_tensors_are_named(name, settings):
    done = run(name, "tall")
    module = Module(40, 24, {**done.module.settings, **settings})
    with pytest.raises(InvalidInput, match=r"road_3|group_size|road_theta"):
        change_by_kind("road", done.tensors, module)


def test_olora_on_conv1d_is_refused_as_it_is_broken_in_peft():
    tensors = {"lora_A": gaussian(R, 32), "lora_B": gaussian(32, R)}
    settings = {"r": R, "alpha": 10}
    with pytest.raises(InvalidInput, match="Conv1D"):
        change_by_kind("olora", tensors, Module(32, 32, settings, is_transposed=True), gaussian(32, 32))


@pytest.mark.parametrize("apply_GS", [False, True])
def test_reflections_without_a_direction_are_refused(apply_GS):
    tensors = {"hra_u": torch.cat([gaussian(8, 1), gaussian(8, 1) * 0], dim=1)}
    with pytest.raises((InvalidInput, NumericalError), match="hra_u"):
        change_by_kind("hra", tensors, Module(8, 8, {"r": 2, "apply_GS": apply_GS}))


def test_blocks_stay_small_and_hold_whole_groups():
    large = list(change_file.row_blocks((4096, 14336), [Change(grain=64), Change(grain=3)]))
    assert max(stop - start for start, stop in large) <= 192
    assert all(start % 192 == 0 for start, _ in large)
    assert [start for start, _ in large[1:]] == [stop for _, stop in large[:-1]]
    assert (large[0][0], large[-1][1]) == (0, 4096)
