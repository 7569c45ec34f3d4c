"""Maps tensors on disk to parameters in memory by transformers' own conversion, on a model without weights."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from kasa_cli.model_names.experts import Composition


class LoadedTensor(NamedTuple):
    """The parameter that a tensor on disk is loaded into; `whole` if the tensor is all of it, unchanged.

    If it does not, `part` is the pattern that its name matched, one of those of `converter`.
    """

    name: str
    whole: bool
    part: str = ""
    converter: WeightConverter | None = None


def loaded_tensors(model: PreTrainedModel, names: Iterable[str]) -> dict[str, LoadedTensor]:
    """The parameter of each tensor on disk. Tensors that transformers does not load are left out."""
    conversions = get_model_conversion_mapping(model)  # a fresh one: some keep state between names
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    memory, prefix = model.state_dict(), model.base_model_prefix
    loaded: dict[str, LoadedTensor] = {}
    sources: set[str] = set()
    for name in in_loading_order(names):
        target, pattern = rename_source_key(name, renamings, converters, prefix, memory)
        if target not in memory and name in memory:  # the loader, too, undoes a rename that leads nowhere
            target, pattern = rename_source_key(name, [], [], prefix, memory)
        tensor = LoadedTensor(target, pattern is None, pattern or "", by_pattern.get(pattern or ""))
        if target in memory and not (
            tensor.whole and target in sources
        ):  # of two, the loader keeps the first
            loaded[name] = tensor
            sources.add(target)
    return loaded


def name_on_disk(model: PreTrainedModel, parameter: str) -> str:
    """The name under which transformers would save a parameter that is one tensor on disk."""
    saved: dict[str, Tensor] = revert_weight_conversion(model, {parameter: torch.empty(0, device="meta")})
    return next(iter(saved))


def in_loading_order(names: Iterable[str]) -> list[str]:
    """The loader's order, on which some renamings depend.

    >>> in_loading_order(["layers.10.w", "layers.9.w"])
    ['layers.9.w', 'layers.10.w']
    """
    try:
        return sorted(names, key=dot_natural_key)
    except ValueError:  # a digit that is no decimal, such as ²
        return sorted(names)


def compositions(loaded: Mapping[str, LoadedTensor]) -> dict[str, Composition]:
    """The tensors of each parameter, in the order in which the loader reads them."""
    arrivals: defaultdict[str, dict[str, LoadedTensor]] = defaultdict(dict)
    for name, tensor in loaded.items():
        arrivals[tensor.name][name] = tensor
    return {parameter: composition(landed) for parameter, landed in arrivals.items()}


def composition(arrivals: Mapping[str, LoadedTensor]) -> Composition:
    """The tensors of one parameter. The first decides the operations, as it does for the loader."""
    first, tensor = next(iter(arrivals.items()))
    if tensor.converter is None:
        return Composition(((first,),))
    parts = tensor.converter.source_patterns
    groups = (tuple(name for name, other in arrivals.items() if other.part == part) for part in parts)
    operations = tuple(described(operation) for operation in tensor.converter.operations)
    return Composition(tuple(group for group in groups if group), operations)


def described(operation: ConversionOps) -> str:
    """An operation with the axes it works on.

    >>> described(Transpose(1, 2))
    'Transpose(1, 2)'
    """
    if isinstance(operation, Transpose):
        return f"Transpose({operation.dim0}, {operation.dim1})"
    return repr(operation)
