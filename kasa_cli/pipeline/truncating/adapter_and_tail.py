"""The adapter and the tail: small tensors in PEFT's layout, written one target after another."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kasa_cli.adapters import peft
from kasa_cli.checkpoint.safetensors_writer import Form, filling, form
from kasa_cli.files.durable import make_folder, write_file
from kasa_cli.files.staging import Staging
from kasa_cli.methods import kasa
from kasa_cli.pipeline.truncating.factors import Measured, read_factors
from kasa_cli.pipeline.truncating.options import Options
from kasa_cli.pipeline.truncating.plan import Plan
from kasa_cli.pipeline.workers import Watcher
from kasa_cli.targets.selection import Target

Make = Callable[[Measured], dict[str, Tensor]]


def write_adapter(
    made: Plan, options: Options, staging: Staging, measured: list[Measured], watcher: Watcher
) -> None:
    """The fresh KaSA adapter, as PEFT stores one."""
    recipe = kasa.Recipe(
        options.rank, kasa.scaling(float(options.lora_alpha), options.rank, options.use_rslora), options.seed
    )

    def make(one: Measured) -> dict[str, Tensor]:
        names = peft.tensor_names(one.target.module)
        begun = kasa.start(read_factors(staging, one), recipe, options.diag_init, one.target.module)
        return {names[field]: getattr(begun, field) for field in names}

    lora = _lora_config(made, [one.target for one in measured], options.rank, options.lora_alpha)
    config = peft.kasa_config(lora, beta=options.beta, gamma=options.gamma, use_rslora=options.use_rslora)
    _write_peft(staging.out / "adapter", config, measured, make, options.rank, watcher)


def write_tail(made: Plan, staging: Staging, measured: list[Measured], watcher: Watcher) -> None:
    """What was dropped, as a plain LoRA of scaling 1; no file when nothing was."""
    cut = [one for one in measured if one.target.dropped]
    if not cut:
        return
    rank = max(one.target.dropped for one in cut)

    def make(one: Measured) -> dict[str, Tensor]:
        names = peft.tensor_names(one.target.module)
        A, B = kasa.tail(read_factors(staging, one))
        missing = rank - len(A)  # one rank for all modules: servers know no other
        pad = torch.nn.functional.pad
        return {names["A"]: pad(A, (0, 0, 0, missing)), names["B"]: pad(B, (0, missing))}

    targets = [one.target for one in cut]
    config = _lora_config(made, targets, rank, rank)
    modules = [target.module for target in targets]
    config = peft.by_parameter(config, peft.taken_for_experts(modules, made.checkpoint.config))
    _write_peft(staging.out / "tail", config, cut, make, rank, watcher)


def _lora_config(made: Plan, targets: list[Target], rank: int, alpha: float) -> dict[str, Any]:
    modules = {slot.module for slot in made.names.slots.values()}
    config = peft.lora_config(
        [target.module for target in targets],
        rank=rank,
        alpha=alpha,
        modules=modules.union(made.names.linear_modules),
        base=(made.source.repo, made.source.commit),
        model_class=made.names.model_class,
    )
    return {**config, "fan_in_fan_out": any(target.matrix.is_transposed for target in targets)}


def _write_peft(
    folder: Path, config: dict[str, Any], measured: list[Measured], make: Make, rank: int, watcher: Watcher
) -> None:
    make_folder(folder)
    layout = _peft_form([one.target for one in measured], rank, with_diag="kasa_config" in config)
    write_tensors(folder / peft.WEIGHTS, layout, measured, make, watcher)
    write_file(folder / peft.CONFIG, [(json.dumps(config, indent=2, sort_keys=True) + "\n").encode()])


def _peft_form(targets: list[Target], rank: int, *, with_diag: bool) -> Form:
    triples: list[tuple[str, str, tuple[int, ...]]] = []
    for target in targets:
        names, (outs, ins) = peft.tensor_names(target.module), target.matrix.shape
        triples.append((names["A"], "F32", (rank, ins)))
        triples.append((names["B"], "F32", (outs, rank)))
        triples += [(names["diag"], "F32", (rank,))] if with_diag else []
    return form(triples)


def write_tensors(
    path: Path,
    layout: Form,
    measured: Iterable[Measured],
    make: Callable[[Measured], dict[str, Tensor]],
    watcher: Watcher,
) -> None:
    """Fill a file of small tensors, those of one target after another."""
    items = list(measured)
    watcher.stage(path.parent.name, len(items), len(items))
    with filling(path, layout) as file:
        for one in items:
            for name, tensor in make(one).items():
                file.put(name, tensor)
            watcher.finished(one.target.name, 1)
