"""Exports a selection as text for a trainer, checked on the model without weights."""

from collections.abc import Sequence

from kasa_cli.checkpoint import Checkpoint
from kasa_cli.model_names import NameMap
from kasa_cli.report import Emission
from kasa_cli.targets import Candidate, Chosen, trainer_configs

EMISSIONS = tuple(trainer_configs.FORMATS)


def export(
    kind: str, best: Sequence[Candidate], checkpoint: Checkpoint, names: NameMap, rank: int
) -> Emission:
    """The text of a selection, after PEFT has wrapped exactly these modules on a model without weights.

    Raises:
        UsageError: the format cannot express this selection.
        IntegrityError: PEFT wraps other modules.
    """
    slots = {slot.module for slot in names.slots.values()}
    chosen = Chosen(
        modules=tuple(candidate.module for candidate in best if candidate.kind == "module"),
        parameters=tuple(candidate.module for candidate in best if candidate.kind == "parameter"),
        all_modules=tuple(sorted(slots.union(names.linear_modules))),
        config=checkpoint.config,
        model_class=names.model_class,
        rank=rank,
        alpha=2.0 * rank,
        fan_in_fan_out=any(candidate.is_transposed for candidate in best),
    )
    text = trainer_configs.emit(kind, chosen)
    from kasa_cli.targets import peft_trial

    shapes = {name: entry.shape for name, entry in checkpoint.tensors.items()}
    judge = peft_trial.check(
        chosen, trainer_configs.lora_config(kind, text, chosen), checkpoint.config, shapes
    )
    return Emission(kind, text, judge)
