"""Writes the adapter and the tail in PEFT's layout, one module or parameter after another."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kasa_cli.adapters import FactorEntry, peft, stack_entry, wrapper_names
from kasa_cli.checkpoint import filling, lay_out
from kasa_cli.files import Staging, make_folder, write_file
from kasa_cli.methods import kasa
from kasa_cli.pipeline.truncating.factors import MeasuredTarget, read_factors
from kasa_cli.pipeline.truncating.options import TruncateRequest
from kasa_cli.pipeline.truncating.plan import Plan
from kasa_cli.pipeline.workers import Watcher
from kasa_cli.targets import Target

Forms = list[tuple[str, str, tuple[int, ...]]]
"""Names, dtypes and shapes of tensors."""


@dataclass(frozen=True)
class FileMember:
    """The tensors of one module or parameter in a file: their shapes, and the function that makes them."""

    name: str
    forms: Forms
    make: Callable[[], dict[str, Tensor]]


def write_adapter(
    plan: Plan, options: TruncateRequest, staging: Staging, measured: list[MeasuredTarget], watcher: Watcher
) -> None:
    """Write the fresh KaSA adapter in PEFT's layout; no file is written if all targets are experts."""
    modules = [measurement for measurement in measured if measurement.target.expert is None]
    if not modules:
        return
    rank = options.rank
    recipe = kasa.Recipe(
        rank, kasa.scaling(float(options.lora_alpha), rank, options.use_rslora), options.seed
    )

    def make(measurement: MeasuredTarget) -> dict[str, Tensor]:
        names = peft.tensor_names(measurement.target.module)
        initial = kasa.initialise(
            read_factors(staging, measurement), recipe, options.diag_init, measurement.target.module
        )
        return {names[field]: getattr(initial, field) for field in names}

    lora = _lora_config(plan, [module.target for module in modules], rank, options.lora_alpha)
    config = peft.kasa_config(lora, beta=options.beta, gamma=options.gamma, use_rslora=options.use_rslora)
    members = [
        FileMember(module.target.name, _forms(module.target, rank, with_diag=True), partial(make, module))
        for module in modules
    ]
    _write_peft(staging.out / "adapter", config, members, watcher)


def write_tail(plan: Plan, staging: Staging, measured: list[MeasuredTarget], watcher: Watcher) -> None:
    """Write the dropped components as a plain LoRA of scaling 1; no file is written if none are dropped."""
    truncated = [measurement for measurement in measured if measurement.target.dropped]
    if not truncated:
        return
    rank = max(
        measurement.target.dropped for measurement in truncated
    )  # servers support one rank per adapter

    def make(measurement: MeasuredTarget) -> dict[str, Tensor]:
        names = peft.tensor_names(measurement.target.module)
        A, B = kasa.tail(read_factors(staging, measurement))
        pad, missing = torch.nn.functional.pad, rank - len(A)
        return {names["A"]: pad(A, (0, 0, 0, missing)), names["B"]: pad(B, (0, missing))}

    modules = [measurement for measurement in truncated if measurement.target.expert is None]
    members = [
        FileMember(module.target.name, _forms(module.target, rank, with_diag=False), partial(make, module))
        for module in modules
    ]
    stacks = _stacks(plan, truncated)
    members += [_stack_member(stack, rank, staging, truncated) for stack in stacks]
    config = _lora_config(plan, [module.target for module in modules], rank, rank)
    config = peft.by_parameter(
        config, peft.taken_for_experts([module.target.module for module in modules], plan.checkpoint.config)
    )
    if stacks:
        named = config["target_parameters"] or []
        config["target_parameters"] = [*named, *(stack.target for stack in stacks)]
    _write_peft(staging.out / "tail", config, members, watcher)


def _stacks(plan: Plan, measured: list[MeasuredTarget]) -> list[FactorEntry]:
    """The tensors of every parameter of fused experts."""
    counts = Counter(
        measurement.target.module for measurement in measured if measurement.target.expert is not None
    )
    shapes = {measurement.target.module: measurement.target.shape for measurement in measured}
    wrappers = wrapper_names(list(counts))
    model_class = plan.names.model_class
    return [
        stack_entry(name, wrappers[name], count, shapes[name], model_class) for name, count in counts.items()
    ]


def _stack_member(
    stack: FactorEntry, rank: int, staging: Staging, measured: list[MeasuredTarget]
) -> FileMember:
    """The tail of a parameter of fused experts."""
    experts = [measurement for measurement in measured if measurement.target.module == stack.target]

    def make() -> dict[str, Tensor]:
        terms = [kasa.truncation(read_factors(staging, expert)) for expert in experts]
        left, right = (torch.stack(side).to(torch.float32) for side in zip(*terms, strict=True))
        return stack.tensors(left, right, rank)

    return FileMember(stack.target, stack.shapes(rank), make)


def _lora_config(plan: Plan, targets: list[Target], rank: int, alpha: float) -> dict[str, Any]:
    modules = {slot.module for slot in plan.names.slots.values()}
    config = peft.lora_config(
        [target.module for target in targets],
        rank=rank,
        alpha=alpha,
        modules=modules.union(plan.names.linear_modules),
        base=(plan.source.repo, plan.source.commit),
        model_class=plan.names.model_class,
    )
    return {**config, "fan_in_fan_out": any(target.matrix.is_transposed for target in targets)}


def _forms(target: Target, rank: int, *, with_diag: bool) -> Forms:
    names, (outs, ins) = peft.tensor_names(target.module), target.matrix.shape
    factors: Forms = [(names["A"], "F32", (rank, ins)), (names["B"], "F32", (outs, rank))]
    return [*factors, (names["diag"], "F32", (rank,))] if with_diag else factors


def _write_peft(folder: Path, config: dict[str, Any], members: list[FileMember], watcher: Watcher) -> None:
    make_folder(folder)
    layout = lay_out(form for member in members for form in member.forms)
    watcher.stage(folder.name, len(members), len(members))
    with filling(folder / peft.WEIGHTS, layout) as file:
        for member in members:
            for name, tensor in member.make().items():
                file.put(name, tensor)
            watcher.finished(member.name, 1)
    write_file(folder / peft.CONFIG, [(json.dumps(config, indent=2, sort_keys=True) + "\n").encode()])
