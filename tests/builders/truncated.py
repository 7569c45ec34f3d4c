"""Checkpoints that `truncate` worked on, loaded by transformers and adapted by PEFT."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from kasa_cli.errors import UsageError
from kasa_cli.pipeline.truncating.run import Options, Patterns, Where, plan, truncate
from kasa_cli.report import TruncateReport
from tests.builders import tiny_models

Tensors = dict[str, torch.Tensor]

RANK = 3  # below the smallest side of any target: Jamba's dt_proj is 64 x 4
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
EXPERTS = ("gate_proj", "up_proj", "down_proj")
REWRITTEN = {"deepseek-v2", "deepseek-v3"}
"""Families where PEFT takes these default targets for routed experts."""
TOKENS = torch.arange(8).view(2, 4) % 6 + 3


@dataclass(frozen=True)
class Case:
    family: str
    model: Path
    out: Path
    report: TruncateReport

    @property
    def modules(self) -> list[str]:
        return sorted(row.module for row in self.report.tensors)

    def original(self) -> PreTrainedModel:
        return load(self.model)

    def truncated(self) -> PreTrainedModel:
        return load(self.out / "base")


def load(folder: Path, **kwargs: Any) -> PreTrainedModel:
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, architecture).from_pretrained(folder, **kwargs).eval()


def made(family: str, folder: Path, **options: Any) -> Case:
    model = tiny_models.save(family, folder / "model")
    report = truncate(Where(str(model)), folder / "out", Options(rank=RANK, workers=1, **options))
    return Case(family, model, folder / "out", report)


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


def wrapped(model: nn.Module) -> list[str]:
    return sorted(
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    )


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def fill_b(model: nn.Module) -> None:
    """The same numbers in every lora_B of any copy of a model."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def cut(model: Path, out: Path, *targets: str, excludes: tuple[str, ...] = (), **options: Any) -> Case:
    """A model truncated, by the patterns given."""
    patterns = Patterns(targets, excludes)
    report = truncate(Where(str(model)), out, Options(**{"rank": RANK, "patterns": patterns, **options}))
    return Case("", model, out, report)


def chosen(model: Path, *targets: str, excludes: tuple[str, ...] = (), **options: Any) -> list[str]:
    """The modules that a plan takes."""
    options = {"rank": RANK, "patterns": Patterns(targets, excludes), **options}
    return sorted(target.module for target in plan(Where(str(model)), Options(**options)).tensors)


def weight_files(folder: Path) -> list[Path]:
    if not (folder / INDEX).exists():
        return [folder / WEIGHTS]
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    return [folder / name for name in sorted({*weight_map.values()})]


def tensors_of(folder: Path) -> Tensors:
    return {name: tensor for path in weight_files(folder) for name, tensor in load_file(path).items()}


def rewritten(model: Path, folder: Path, change: Callable[[Tensors], Tensors], **config: Any) -> Path:
    """A copy of a model with other tensors and other words in its config."""
    folder.mkdir()
    save_file(change(tensors_of(model)), folder / WEIGHTS, {"format": "pt"})
    old = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**old, **config}))
    return folder


def kept(W: torch.Tensor, components: int) -> np.ndarray:
    """What the largest components make, by numpy's SVD in float64."""
    U, S, Vh = np.linalg.svd(W.double().numpy(), full_matrices=False)
    return (U[:, :components] * S[:components]) @ Vh[:components]


def refused(model: Path, *targets: str, **options: Any) -> str:
    """Why neither a plan nor a truncation is made."""
    with pytest.raises(UsageError) as caught:
        chosen(model, *targets, **options)
    with pytest.raises(UsageError) as again:
        cut(model, model.parent / "never", *targets, **options)
    assert str(again.value) == str(caught.value) and not (model.parent / "never").exists()
    return str(caught.value)
