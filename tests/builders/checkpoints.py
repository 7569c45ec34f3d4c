"""Checkpoints in folders: plain ones that only kasa reads, changed copies, and models that transformers loads."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")

INDEX = "model.safetensors.index.json"

WEIGHTS = "model.safetensors"

TOKENS = torch.arange(8).view(2, 4) % 6 + 3

Tensors = dict[str, torch.Tensor]


def plain_model(
    folder: Path, layers: int = 2, dim: int = 16, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Path:
    """One shard of square linear weights of a family that transformers does not know: only kasa reads it."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        f"model.layers.{layer}.{module}.weight": torch.randn(dim, dim, generator=generator).to(dtype)
        for layer in range(layers)
        for module in LINEAR
    }
    weights["model.embed_tokens.weight"] = torch.randn(8, dim, generator=generator).to(dtype)
    return save_plain(weights, folder)


def save_plain(weights: dict[str, torch.Tensor], folder: Path, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "none-of-these"}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def changed(model: Path, folder: Path, **tensors: Any) -> Path:
    """A copy of a model with some tensors passed through functions; dots in names are spelled `__`."""
    weights = load_file(model / "model.safetensors")
    for name, function in tensors.items():
        key = f"{name.replace('__', '.')}.weight"
        weights[key] = function(weights[key])
    return save_plain(weights, folder, config_of(model))


def weight_files(folder: Path) -> list[Path]:
    if not (folder / INDEX).exists():
        return [folder / WEIGHTS]
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    return [folder / name for name in sorted({*weight_map.values()})]


def tensors_of(folder: Path) -> Tensors:
    return {name: tensor for path in weight_files(folder) for name, tensor in load_file(path).items()}


def rewritten(model: Path, folder: Path, change: Callable[[Tensors], Tensors], **config: Any) -> Path:
    """A copy of a model with other tensors, and other fields in its config."""
    folder.mkdir(exist_ok=True)
    save_file(change(tensors_of(model)), folder / WEIGHTS, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config_of(model), **config}))
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def load(folder: Path, **kwargs: Any) -> PreTrainedModel:
    return (
        getattr(transformers, config_of(folder)["architectures"][0]).from_pretrained(folder, **kwargs).eval()
    )


def logits(model: nn.Module) -> torch.Tensor:
    """The output of any of the families for a fixed input."""
    family, tokens = model.config.model_type, {"input_ids": TOKENS}
    pixels = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)}
    inputs = {
        "vit": pixels,
        "t5": {**tokens, "decoder_input_ids": TOKENS},
        "whisper": {
            "input_features": torch.linspace(-1, 1, 2 * 8 * 32).view(2, 8, 32),
            "decoder_input_ids": TOKENS,
        },
        "gemma3": {
            **pixels,
            "input_ids": torch.cat([torch.full((2, 4), 9), TOKENS], 1),
            "token_type_ids": torch.tensor([[1] * 4 + [0] * 4] * 2),
        },
    }
    with torch.no_grad():
        output: torch.Tensor = model(**inputs.get(family, tokens))[0]
    return output
