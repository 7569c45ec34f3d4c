"""A checkpoint of Llama's shapes with random weights, written tensor by tensor: FOLDER WIDTH LAYERS."""

import json
import sys
from pathlib import Path

import torch

from kasa_cli.checkpoint.safetensors_writer import filling, lay_out

WIDTHS = {
    2048: {"intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8},
    4096: {"intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
}
"""Llama 3.2 1B and Llama 3.1 8B, by hidden size. Any other width gets the proportions of the first."""
VOCABULARY = 1024


def config(width: int, layers: int) -> dict[str, object]:
    shapes = WIDTHS.get(
        width, {"intermediate_size": 4 * width, "num_attention_heads": 8, "num_key_value_heads": 2}
    )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        **shapes,
    }


def write(folder: Path, width: int, layers: int) -> Path:
    """One file a layer, in bfloat16, entries normal with standard deviation 0.02; not written twice."""
    made = config(width, layers)
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    groups = [("embed", _ends(made)), *((f"{n:02d}", _layer(made, n)) for n in range(layers))]
    for label, tensors in groups:
        file = f"model-{label}.safetensors"
        with filling(
            folder / file, lay_out((name, "BF16", shape) for name, shape in tensors.items())
        ) as shard:
            for name, shape in tensors.items():
                shard.put(name, _random(name, shape))
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(made))
    return folder


def _random(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)


def _ends(made: dict[str, object]) -> dict[str, tuple[int, ...]]:
    width = int(str(made["hidden_size"]))
    return {"model.embed_tokens.weight": (VOCABULARY, width), "model.norm.weight": (width,)}


def _layer(made: dict[str, object], number: int) -> dict[str, tuple[int, ...]]:
    width, inner = int(str(made["hidden_size"])), int(str(made["intermediate_size"]))
    narrow = width * int(str(made["num_key_value_heads"])) // int(str(made["num_attention_heads"]))
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (narrow, width),
        "self_attn.v_proj": (narrow, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    return {f"model.layers.{number}.{name}.weight": shape for name, shape in shapes.items()}


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
