"""Layout of the merged checkpoint: tensor names, shapes and config.json, settled before any value is computed.

It differs from the base only if an adapter changes some of several tied weights, or has another vocabulary. Then
transformers is imported.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kasa_cli.adapters import PlacedItem, TiedItems, tied_items
from kasa_cli.checkpoint import Checkpoint, model_config
from kasa_cli.errors import InvalidInput
from kasa_cli.files import enumerated
from kasa_cli.model_names import Group, ModuleKind, NameMap, Shapes, UnknownFamily
from kasa_cli.pipeline.adapter_on_base import Origin
from kasa_cli.pipeline.merging.edits import Merging

NOT_NEEDED = "--untie has no effect: the adapters leave tied weights equal"
VOCABULARIES = (ModuleKind.EMBEDDING, ModuleKind.HEAD)


@dataclass(frozen=True)
class MergedLayout:
    """The differences in layout between a merged checkpoint and its base.

    `config` is None if it is the base's. `shapes` holds resized tensors. `sources` maps each new tensor to the tensor
    of the base that it is made from.
    """

    config: Mapping[str, Any] | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def settle_layout(
    base: Origin, names: NameMap, mergings: Sequence[Merging], may_untie: bool
) -> tuple[MergedLayout, list[Merging]]:
    """The layout, and the adapters placed on its tensors.

    Raises:
        InvalidInput: an adapter unties weights, which is not allowed or not possible; or a part of the model keeps
            the old size of the vocabulary.
    """
    layout, mergings = _untied(base, names, mergings, may_untie)
    return _resized(base.checkpoint, names, layout, mergings), mergings


# --- tied weights ---


def _untied(
    base: Origin, names: NameMap, mergings: Sequence[Merging], may_untie: bool
) -> tuple[MergedLayout, list[Merging]]:
    groups = _tied_groups(base, names, mergings)
    if not groups:
        return MergedLayout(notes=(NOT_NEEDED,) if may_untie else ()), list(mergings)
    tied = [tied_items(merging.adapter, (*merging.placed, *merging.values), groups) for merging in mergings]
    apart = {id(group): group for items in tied for group in items.apart}
    if not apart:
        return MergedLayout(notes=(NOT_NEEDED,) if may_untie else ()), _placed_at(mergings, tied, groups)
    if not may_untie:
        raise _still_tied(mergings, tied)
    from kasa_cli.model_names import tied_weights

    untied = tied_weights.taken_apart(base.checkpoint.config, _shapes(base.checkpoint), apart.values())
    names_untied = enumerated([name for group in apart.values() for name in group.ends])
    note = f"untied, so each has its own tensor: {names_untied}; {model_config.TIED} is false in config.json"
    return MergedLayout(untied.config, {}, untied.sources, (note,)), _placed_at(mergings, tied, untied.groups)


def _placed_at(
    mergings: Sequence[Merging], tied: Sequence[TiedItems], groups: Iterable[Group]
) -> list[Merging]:
    on_disk = {name: stored for group in groups for name, stored in group.tensors.items()}
    placed = [items.placed_at(on_disk) for items in tied]
    return [
        replace(merging, placed=patches, values=values)
        for merging, (patches, values) in zip(mergings, placed, strict=True)
    ]


def _still_tied(mergings: Sequence[Merging], tied: Sequence[TiedItems]) -> InvalidInput:
    pairs = zip(mergings, tied, strict=True)
    merging, group = next((merging, items.apart[0]) for merging, items in pairs if items.apart)
    problem = f"the adapter makes tied weights differ ({enumerated([*group.ends])})"
    return InvalidInput(
        problem, str(merging.adapter.path), "give --untie to write a separate tensor for each"
    )


def _tied_groups(base: Origin, names: NameMap, mergings: Sequence[Merging]) -> list[Group]:
    """The groups of tied weights, if an adapter changes one of them. Weights that differ on disk are not tied."""
    places: list[PlacedItem] = []
    for merging in mergings:
        places += [*merging.placed, *merging.values]
    on_disk = {part.piece.name for place in places for parts in place.matrices for part in parts}
    on_disk |= {place.bias for merging in mergings for place in merging.placed if place.bias}
    if not any(names.slots[name].tied_with for name in on_disk):
        return []
    from kasa_cli.model_names import tied_weights

    tied_groups = []
    for group in tied_weights.groups_of(base.checkpoint.config, _shapes(base.checkpoint)):
        names_of_group = group.tensors.values()
        is_one = len(names_of_group) == 1 or len({base.digest(name) for name in names_of_group}) == 1
        if is_one:
            tied_groups.append(group)
        elif len(names_of_group) < len(group.ends) and not on_disk.isdisjoint(names_of_group):
            problem = f"some of these tied weights differ on disk: {enumerated([*group.ends])}"
            raise InvalidInput(
                problem, str(base.checkpoint.root), "load it with transformers and save it again"
            )
    return tied_groups


# --- another vocabulary ---


def _resized(
    checkpoint: Checkpoint, names: NameMap, layout: MergedLayout, mergings: Sequence[Merging]
) -> MergedLayout:
    resizing = [merging for merging in mergings if any(value.vocabulary for value in merging.values)]
    if not resizing:
        return layout
    path = str(resizing[-1].adapter.path)
    values = [value for merging in resizing for value in merging.values if value.vocabulary]
    sizes = {value.vocabulary for value in values if value.vocabulary}
    if len(sizes) > 1:
        problem = f"vocabularies of {enumerated([str(new) for _, new in sorted(sizes)])} rows"
        raise InvalidInput(problem, path, "merge adapters of one vocabulary")
    [(old, new)] = sizes
    config = model_config.resized(layout.config or checkpoint.config, old, new)
    shapes = {value.matrices[0][0].piece.name: (new, *value.shape[1:]) for value in values}
    copied = {name: checkpoint.tensors[source].shape for name, source in layout.sources.items()}
    behind = _left_behind(config, {**_shapes(checkpoint), **copied, **shapes}, names, old)
    if behind:
        problem = (
            f"a vocabulary of {new} rows, but {enumerated(behind, 3)} has {old} and is not in the adapter"
        )
        raise InvalidInput(problem, path, "save both the embedding and the head with the adapter")
    note = f"the vocabulary is resized from {old} to {new} rows; the tokenizer is that of the base"
    return replace(layout, config=config, shapes=shapes, notes=(*layout.notes, note))


def _left_behind(config: Mapping[str, Any], shapes: Shapes, names: NameMap, old: int) -> list[str]:
    """The tensors whose shapes contradict the config: those that keep the old vocabulary."""
    from kasa_cli.model_names import name_map

    try:
        return name_map.misfits(config, shapes)
    except UnknownFamily:
        embeddings = [name for name, slot in names.slots.items() if slot.kind in VOCABULARIES]
        return [name for name in embeddings if shapes[name][:1] == (old,)]


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: entry.shape for name, entry in checkpoint.tensors.items()}
