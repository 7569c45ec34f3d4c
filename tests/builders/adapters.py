"""Adapters saved by PEFT on tiny models: one table of kinds for all tests that read them."""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from tests.builders import shared, tiny_models

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
QV = ["q_proj", "v_proj"]
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": QV}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@dataclass(frozen=True)
class Case:
    """A kind of adapter as PEFT makes it, and how many patches and other values it holds."""

    family: str
    make: Callable[..., Any]
    options: Mapping[str, Any]
    kind: str
    num_patches: int = 4
    num_values: int = 0
    num_rows: int = 0
    layers: tuple[str, ...] = field(default=())


def lora(
    family: str, kind: str = "lora", patches: int = 4, values: int = 0, rows: int = 0, **options: Any
) -> Case:
    return Case(family, peft.LoraConfig, {**LORA, **options}, kind, patches, values, rows)


def other(
    make: Callable[..., Any], kind: str, family: str = "llama", patches: int = 4, values: int = 0, **o: Any
) -> Case:
    return Case(family, make, {"target_modules": QV, **o}, kind, patches, values)


CASES: dict[str, Case] = {
    "lora": lora("llama"),
    "rslora": lora("llama", use_rslora=True),
    "patterns": lora(
        "llama", rank_pattern={"v_proj": 2, r"layers.0.*q_proj": 8}, alpha_pattern={"1.*.v_proj": 3}
    ),
    "pissa": lora("llama", "pissa", init_lora_weights="pissa"),
    "pissa-niter": lora("llama", "pissa", init_lora_weights="pissa_niter_2"),
    "olora": lora("llama", "olora", init_lora_weights="olora"),
    "orthogonal": lora("llama", init_lora_weights="orthogonal"),
    "mica": lora("llama", init_lora_weights="mica"),
    "dora": lora("llama", "dora", use_dora=True),
    "dora-embedding": lora("llama", "dora", 1, 1, use_dora=True, target_modules=["embed_tokens"]),
    "dora-conv1d": lora(
        "gpt2", "dora", 6, use_dora=True, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True
    ),
    "kasa": lora("llama", "kasa", kasa_config=peft.KasaConfig()),
    "lora-bias": lora("qwen2", lora_bias=True),
    "bias-all": lora("qwen2", "lora", 2, 6, bias="all", target_modules=["q_proj"]),
    "bias-only": lora("qwen2", "lora", 4, 2, bias="lora_only", target_modules=["q_proj", "o_proj"]),
    "embedding": lora("llama", "lora", 2, 2, target_modules=["embed_tokens", "lm_head"]),
    "embedding-tied": lora("llama-tied", "lora", 1, 1, target_modules=["embed_tokens"]),
    "conv1d": lora("gpt2", patches=6, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    "neox": lora("gpt-neox", patches=2, target_modules=["query_key_value"]),
    "vlm": lora("gemma3-vlm", patches=8, target_modules=QV),
    "saved": lora("llama", values=6, modules_to_save=["lm_head", "norm"]),
    "tokens": lora("llama", rows=1, trainable_token_indices=[1, 5]),
    "tokens-by-layer": lora(
        "llama", rows=2, trainable_token_indices={"embed_tokens": [1, 5], "lm_head": [3]}
    ),
    "tokens-tied": lora("llama-tied", rows=1, trainable_token_indices=[7]),
    "experts": lora(
        "mixtral", patches=8, target_modules=["q_proj"], target_parameters=[*EXPERTS, "mlp.gate.weight"]
    ),
    "experts-qwen3": lora("qwen3-moe", patches=4, target_modules=[], target_parameters=EXPERTS),
    "experts-patterns": lora(
        "qwen3-moe",
        patches=4,
        target_modules=[],
        target_parameters=EXPERTS,
        rank_pattern={"experts.down_proj": 2},
        alpha_pattern={r"0.mlp.experts.gate_up_proj": 5},
    ),
    "experts-gpt-oss": lora("gpt-oss", patches=6, target_modules=["q_proj"], target_parameters=EXPERTS),
    "experts-llama4": lora("llama4-text", patches=4, target_modules=[], target_parameters=EXPERTS),
    "experts-one": lora("gpt-oss", patches=2, target_modules=[], target_parameters=["experts.down_proj"]),
    "weight-parameter": lora("llama", patches=2, target_modules=[], target_parameters=["q_proj.weight"]),
    "adalora": other(peft.AdaLoraConfig, "adalora", init_r=6, target_r=4, total_step=10, lora_alpha=3),
    "ia3": other(
        peft.IA3Config, "ia3", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "ia3-conv1d": other(
        peft.IA3Config,
        "ia3",
        "gpt2",
        target_modules=["c_attn", "mlp.c_proj"],
        feedforward_modules=["mlp.c_proj"],
        fan_in_fan_out=True,
    ),
    "hra": other(peft.HRAConfig, "hra", r=4),
    "hra-gs": other(peft.HRAConfig, "hra", r=4, apply_GS=True),
    "delora": other(peft.DeloraConfig, "delora", r=4, rank_pattern={"v_proj": 2}),
    "loha": other(peft.LoHaConfig, "loha", r=4, alpha=2),
    "lokr": other(peft.LoKrConfig, "lokr", r=4, alpha=2),
    "lokr-both": other(
        peft.LoKrConfig, "lokr", r=2, alpha=2, decompose_both=True, rank_pattern={"v_proj": 1}
    ),
    "oft": other(peft.OFTConfig, "oft", oft_block_size=8),
    "oft-exact": other(
        peft.OFTConfig, "oft", r=4, oft_block_size=0, block_share=True, coft=True, use_cayley_neumann=False
    ),
    "oft-embedding": other(
        peft.OFTConfig, "oft", patches=1, values=1, oft_block_size=8, target_modules=["embed_tokens"]
    ),
    "vera": other(peft.VeraConfig, "vera", r=4),
    "hira": other(peft.HiraConfig, "hira", r=4),
    "hira-embedding": other(
        peft.HiraConfig, "hira", patches=1, values=1, r=4, target_modules=["embed_tokens"]
    ),
    "miss": other(peft.MissConfig, "miss", r=4),
    "miss-bat": other(peft.MissConfig, "miss", r=4, init_weights="bat"),
    "miss-mini": other(peft.MissConfig, "miss", r=4, mini_r=2, init_weights="mini"),
    "osf": other(peft.OSFConfig, "osf", effective_rank=4),
    "randlora": other(peft.RandLoraConfig, "randlora", r=4),
    "road": other(peft.RoadConfig, "road", group_size=8),
    "trainable-tokens": Case(
        "llama",
        peft.TrainableTokensConfig,
        {"token_indices": [2, 3], "target_modules": ["embed_tokens"]},
        "trainable_tokens",
        0,
        0,
        1,
    ),
    "ln-tuning": Case(
        "llama", peft.LNTuningConfig, {"target_modules": ["input_layernorm"]}, "ln_tuning", 0, 2
    ),
}


def live(name: str) -> PeftModel:
    """PEFT's own model of a case, with its adapter as initialised."""
    case = CASES[name]
    torch.manual_seed(0)
    with warnings.catch_warnings(action="ignore"):
        return peft.get_peft_model(tiny_models.fresh(case.family), case.make(**case.options))


@torch.no_grad()
def disturb(model: nn.Module) -> None:
    """Add noise to every trainable parameter, as if it had been trained."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape))


def disturb_saved(adapter: Path) -> Path:
    """The same on disk, in place: every tensor of a saved adapter."""
    generator = torch.Generator().manual_seed(3)
    tensors = load_file(adapter / WEIGHTS)
    moved = {name: W + 0.1 * torch.randn(W.shape, generator=generator) for name, W in tensors.items()}
    save_file(moved, adapter / WEIGHTS, {"format": "pt"})
    return adapter


def save(name: str, folder: Path) -> Path:
    """Write a case as PEFT does, and return its folder."""
    model = live(name)
    disturb(model)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters()), name
    with warnings.catch_warnings(action="ignore"):
        model.save_pretrained(folder)
    return folder


@cache
def saved(name: str) -> Path:
    """A case's adapter that all tests share: read it, copy it, never write into it."""
    return shared.keep(save(name, shared.place("adapters", name)))


def base_of(name: str) -> Path:
    """The checkpoint that a case's adapter was made on; all tests share it."""
    return tiny_models.saved(CASES[name].family)


def tampered(
    adapter: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any] | None = None, **config: Any
) -> Path:
    """A copy of an adapter with other tensors, or other fields in its config; ... takes a field away."""
    folder.mkdir()
    tensors = load_file(adapter / WEIGHTS)
    if change:
        change(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"}
    )
    fields = {**json.loads((adapter / CONFIG).read_text()), **config}
    (folder / CONFIG).write_text(
        json.dumps({key: value for key, value in fields.items() if value is not ...})
    )
    return folder


def wrapped(model: nn.Module) -> list[str]:
    return sorted(
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    )


def fill_b(model: nn.Module) -> None:
    """The same numbers in every lora_B of any copy of a model."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def put(name: str, shape: tuple[int, ...]) -> Callable[[dict[str, torch.Tensor]], Any]:
    """A change for `tampered`: one more tensor, of zeros."""
    return lambda tensors: tensors.update({f"{PREFIX}{name}": torch.zeros(shape)})


def save_lite(path: Path, tensors: Mapping[str, torch.Tensor], **cfg: Any) -> Path:
    """A file as lora-lite saves it: the config as JSON in the header; ... takes a field away."""
    fields = {key: value for key, value in cfg.items() if value is not ...}
    save_file(dict(tensors), path, {"cfg": json.dumps(fields)})
    return path
