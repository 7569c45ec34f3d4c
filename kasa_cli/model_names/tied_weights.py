"""Tied weights: which parameters share memory, and the config and tensors of the untied model.

A checkpoint stores tied weights once. transformers ties them by the class and by config.json, so both are asked, on
a model without weights; what the class ties whatever the config says cannot be untied.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from kasa_cli.checkpoint import model_config
from kasa_cli.errors import InvalidInput
from kasa_cli.files import enumerated
from kasa_cli.model_names import meta_model
from kasa_cli.model_names.conversion import loaded_tensors, name_on_disk
from kasa_cli.model_names.name_map import aliases
from kasa_cli.model_names.names import Group, Shapes


@dataclass(frozen=True)
class Apart:
    """The untied model: its config, and the new tensors, each with the tensor that it copies."""

    config: Mapping[str, Any]
    groups: tuple[Group, ...]
    sources: Mapping[str, str]


def groups_of(config: Mapping[str, Any], shapes: Shapes) -> tuple[Group, ...]:
    """The groups of tied parameters that have a tensor on disk."""
    return _groups(meta_model.build(config, shapes), shapes)


def taken_apart(config: Mapping[str, Any], shapes: Shapes, touched: Iterable[Group]) -> Apart:
    """The model with `tie_word_embeddings` false: every parameter that this frees has a tensor of its own.

    Raises:
        InvalidInput: its class ties one of the touched groups whatever config.json says.
    """
    edited = model_config.untied(config)
    before, after = meta_model.build(config, shapes), meta_model.build(edited, shapes)
    still = set(aliases(after))
    for group in touched:
        if not still.isdisjoint(group.ends):
            problem = f"{type(after).__name__} ties {enumerated([*group.ends])} whatever config.json says"
            raise InvalidInput(problem, "--untie", "train the adapter on all of them, or on none")
    groups, sources = [], {}
    for group in _groups(before, shapes):
        if still.isdisjoint(group.ends):
            source = next(iter(group.tensors.values()))
            ends = {end: name or name_on_disk(after, end) for end, name in group.ends.items()}
            sources.update({name: source for name in ends.values() if name not in shapes})
            groups.append(Group(ends))
    new = {**shapes, **{name: shapes[source] for name, source in sources.items()}}
    _require_filled(after, new, before, still)
    return Apart(edited, tuple(groups), sources)


def _groups(model: PreTrainedModel, shapes: Shapes) -> tuple[Group, ...]:
    on_disk = {tensor.name: name for name, tensor in loaded_tensors(model, shapes).items() if tensor.whole}
    names = dict.fromkeys(aliases(model).values())
    groups = [Group({end: on_disk.get(end) for end in ends}) for ends in names]
    return tuple(group for group in groups if group.tensors)


def _require_filled(
    after: PreTrainedModel, shapes: Shapes, before: PreTrainedModel, still: Collection[str]
) -> None:
    """Refuse a model in which untying changes more than the tied parameters."""
    memory = {name: tuple(tensor.shape) for name, tensor in after.state_dict().items()}
    same = {name: tuple(tensor.shape) for name, tensor in before.state_dict().items()}
    filled = {tensor.name for tensor in loaded_tensors(after, shapes).values()}
    freed = {name for name in aliases(before) if name not in still}
    odd = [
        name for name in memory if same.get(name) != memory[name] or (name in freed and name not in filled)
    ]
    if odd:
        problem = f"{type(after).__name__} untied has no tensor on disk for {enumerated(odd, 3)}"
        raise InvalidInput(problem, "--untie")
