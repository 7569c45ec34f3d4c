"""Faulty files: raw safetensors with any header, and small checkpoints to damage."""

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def st(
    path: Path, header: object, body: bytes = b"", n: int | None = None, sparse: int | None = None
) -> Path:
    """A raw safetensors file. `n` lies about the length of the header; `sparse` gives a body of holes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw) if n is None else n) + raw + body)
        if sparse is not None:
            file.truncate(8 + len(raw) + sparse)
    return path


def tensor(begin: int, end: int, shape: tuple[int, ...] = (2, 2), dtype: str = "F32") -> dict[str, Any]:
    """One entry of a header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def shard_name(number: int, total: int) -> str:
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def tiny_model(folder: Path, layers: int = 2, dim: int = 16, shards: int = 2) -> Path:
    """A valid checkpoint of a few KB: two linear weights a layer, an index when there are several shards."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in range(layers) for part in "qv"]
    weights = {name: torch.randn(dim, dim, generator=generator) for name in names}
    files = {name: shard_name(position % shards + 1, shards) for position, name in enumerate(names)}
    if shards == 1:
        files = dict.fromkeys(names, "model.safetensors")
    for file in set(files.values()):
        part = {name: weights[name] for name in names if files[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    if shards > 1:
        write_index(folder, files)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": dim}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def write_index(folder: Path, weight_map: object, name: str = "model.safetensors.index.json") -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / name).write_text(json.dumps(index))


def weight_map(folder: Path, name: str = "model.safetensors.index.json") -> dict[str, str]:
    return json.loads((folder / name).read_text())["weight_map"]
