"""The places of an adapter's patches: from modules in memory to the tensors of the base on disk.

In PEFT, W is always (out x in), however it is stored. A patch changes the tensors on disk that hold its weight: one
tensor, or, for fused experts, as many as there are experts and projections.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from types import MappingProxyType

from kasa_cli.adapters.adapter import UNKNOWN_PARAMETER, Adapter, Patch
from kasa_cli.adapters.base import BaseIndex, Part, StoredPieces, Tensors, pieces_of
from kasa_cli.adapters.module_settings import Resolver, resolver_of
from kasa_cli.adapters.peft import CONFIG
from kasa_cli.adapters.saved_parameters import declared, ends_with_name
from kasa_cli.adapters.tensor_names import ends_with
from kasa_cli.checkpoint import Matrix, Orientation
from kasa_cli.errors import InvalidInput
from kasa_cli.files import enumerated, quote
from kasa_cli.methods.adapter_kinds import BIAS, is_absent, is_of_embedding, sizes_of, version_of
from kasa_cli.model_names import ModuleKind, NameMap, Weight, split_name

REMEDY = "the file is incomplete, or belongs to another base"

NARROWED = ("exclude_modules", "layers_to_transform")

FIRST_BY_LAYOUT = (0, 19)
"""The first PEFT that reads the orientation of fused experts from their module. Older ones assume (in, out)."""
TURNED_CLASSES = ("GptOss", "OpenAIPrivacyFilter", "Aria")
"""Beginnings of the names of classes whose experts are stored (in, out)."""


@dataclass(frozen=True)
class Placed:
    """The place of a patch. Each of `matrices` is one weight of `shape` in memory, its parts stacked by rows.

    `is_transposed`: memory holds (in, out), the transpose of the adapter's product. `is_turned`: the files hold the
    transpose of the matrix in memory. `bias` is the module's bias on disk, if the patch changes it. `tied_with` is
    another module with the same tensor, `tied` whether the adapter leaves that module unchanged.
    `matrix` is the weight as (out, in), where the patch is for one matrix.
    """

    patch: Patch
    shape: tuple[int, int]
    matrices: tuple[tuple[Part, ...], ...]
    is_transposed: bool
    is_turned: bool
    bias: str | None
    tied_with: str | None
    tied: bool
    matrix: Matrix | None = None

    @property
    def name(self) -> str:
        """The module."""
        return self.patch.module

    @property
    def sides(self) -> tuple[int, int]:
        """(out_features, in_features) of the adapter's product."""
        return (self.shape[1], self.shape[0]) if self.is_transposed else self.shape


def placed(adapter: Adapter, names: NameMap, tensors: Tensors) -> tuple[Placed, ...]:
    """The tensors on disk that every patch of an adapter changes.

    Raises:
        InvalidInput: the base lacks a module, or its shape does not fit; or a target in the base has no tensors.
    """
    base = BaseIndex(names, tensors)
    settled = settle(adapter, base)
    touched = adapter.touched | {patch.module for patch in settled}
    require_complete(adapter, base, touched)
    resized = {
        split_name(replacement.parameter)[0]: adapter.container.tensors[replacement.tensor].shape
        for replacement in adapter.replacements
        if replacement.why == "base layer" and split_name(replacement.parameter)[1] == "weight"
    }
    return tuple(place(adapter, base, patch, resized.get(patch.module), touched) for patch in settled)


# --- patches ---


def place(
    adapter: Adapter, base: BaseIndex, patch: Patch, resized: tuple[int, ...] | None, touched: frozenset[str]
) -> Placed:
    """Place one patch on its weight and check every shape."""
    weight = weight_of(base, patch)
    stored = pieces_of(base, weight)
    shape = (weight.shape[-2], weight.shape[-1])
    if resized is not None and len(resized) == 2:
        shape = (resized[0], resized[1])
        stored = StoredPieces(((Part(stored.matrices[0][0].piece, 0, shape[0]),),), stored.is_turned)
    is_transposed = is_in_out(adapter, base, patch, weight, shape)
    placement = Placed(
        patch,
        shape,
        stored.matrices,
        is_transposed,
        stored.is_turned,
        bias_of(base, patch),
        weight.tied_with,
        weight.tied_with is not None and weight.tied_with not in touched,
        one_matrix(base, stored, is_transposed),
    )
    check_shapes(adapter, placement)
    return placement


def one_matrix(base: BaseIndex, stored: StoredPieces, is_transposed: bool) -> Matrix | None:
    """The weight as (out, in); None for several experts."""
    if len(stored.matrices) > 1:
        return None
    pieces = tuple(part.piece for part in stored.matrices[0])
    orientation = Orientation.of(stored.is_turned != is_transposed)
    return Matrix.of(base.tensors, pieces[0].name, pieces, orientation)


def weight_of(base: BaseIndex, patch: Patch) -> Weight:
    """The weight in memory that a patch changes."""
    weight = base.weights.get(f"{patch.module}.{patch.parameter}") if patch.parameter != "weight" else None
    weight = weight or base.weight(patch.module)
    if weight is None:
        is_there = any(slot.module == patch.module for slot in base.names.slots.values())
        problem = "no matrix in the base: nothing to merge into" if is_there else "no such module in the base"
        tensor = next(iter(patch.tensors.values()))
        raise InvalidInput(
            f"{problem}: {quote(patch.module)}", tensor, "name the base that it was trained on"
        )
    return weight


def is_in_out(
    adapter: Adapter, base: BaseIndex, patch: Patch, weight: Weight, shape: tuple[int, int]
) -> bool:
    """Whether memory holds the transpose of the adapter's product."""
    if not weight.is_module:
        return is_expert_in_out(adapter, base, patch, shape)
    if is_of_embedding(patch.tensors):
        return True
    if base.names.model_class is None:  # without the class, only the config identifies a Conv1D
        return bool(patch.settings.get("fan_in_fan_out"))
    return weight.kind is ModuleKind.CONV1D


def is_expert_in_out(adapter: Adapter, base: BaseIndex, patch: Patch, shape: tuple[int, int]) -> bool:
    """Whether PEFT treated the experts as stored (in, out). The shapes determine this unless they are square."""
    entries = adapter.container.tensors
    sides = (entries[patch.tensors["lora_B"]].shape[0], entries[patch.tensors["lora_A"]].shape[-1])
    if shape[0] != shape[1]:
        return sides == shape[::-1]
    if version_of(adapter.config) < FIRST_BY_LAYOUT:
        return True
    if base.names.model_class is None:
        raise InvalidInput(
            "the experts are square and their class is unknown, so their orientation is unknown", patch.module
        )
    return holds_experts_in_out(base.names.model_class)


def holds_experts_in_out(model_class: str) -> bool:
    """Whether PEFT treats the experts of a class as stored (in, out) in memory."""
    return model_class.startswith(TURNED_CLASSES)


def check_shapes(adapter: Adapter, placement: Placed) -> None:
    """Check that every tensor of a patch fits the sides of the weight."""
    patch, entries = placement.patch, adapter.container.tensors
    out_features, in_features = placement.sides
    known = {"o": out_features, "i": in_features}
    if "r" in patch.settings:
        known["r"] = patch.settings["r"] * len(placement.matrices)
    shapes = {short: entries[name].shape for short, name in patch.tensors.items()}
    sizes_of(patch.row, patch.settings, shapes, known, patch.tensors)


def bias_of(base: BaseIndex, patch: Patch) -> str | None:
    """The bias on disk that a patch changes with its weight."""
    name = base.holder(patch.module, "bias") or base.tied(patch.module, "bias")
    if BIAS in patch.tensors and name is None:
        raise InvalidInput(
            f"a bias for {quote(patch.module)}, which has no bias in the base", patch.tensors[BIAS]
        )
    return name if BIAS in patch.tensors or patch.row.changes_bias(patch.settings) else None


# --- parameters that are not modules ---


def settle(adapter: Adapter, base: BaseIndex) -> tuple[Patch, ...]:
    """Every patch with its parameter: PEFT nests the wrappers of a module, the first parameter innermost."""
    patches = [replace(patch, module=base.memory_name(patch.module)) for patch in adapter.patches]
    nested: defaultdict[str, list[Patch]] = defaultdict(list)
    for patch in patches:
        if patch.parameter == UNKNOWN_PARAMETER:
            nested[patch.module].append(patch)
    resolver = resolver_of(adapter.config, adapter.path / CONFIG) if nested else None
    named = {
        id(patch): name
        for module, own in nested.items()
        for patch, name in parameters(adapter, base, module, own)
    }
    return tuple(
        settled(resolver, patch, named[id(patch)]) if resolver and id(patch) in named else patch
        for patch in patches
    )


def parameters(
    adapter: Adapter, base: BaseIndex, module: str, patches: list[Patch]
) -> Iterable[tuple[Patch, str]]:
    """The patches of one module with their parameters, innermost first."""
    patterns = adapter.config["target_parameters"]
    stacks = [split_name(weight.label)[1] for weight in base.stacks.get(module, ())]
    targeted = [name for name in stacks if any(ends_with(f"{module}.{name}", target) for target in patterns)]
    if not targeted:
        targeted = ["weight"]
    depths = sorted(patch.depth for patch in patches)
    if depths != list(range(len(targeted))):
        problem = f"{len(patches)} wrappers for {len(targeted)} targeted parameters ({enumerated(targeted)})"
        raise InvalidInput(
            problem, next(iter(patches[0].tensors.values())), "name the base that it was trained on"
        )
    if len(targeted) > 1 and base.names.model_class is None:
        raise InvalidInput(
            "several parameters of a module whose class is unknown, so their order is unknown", module
        )
    return zip(sorted(patches, key=lambda patch: -patch.depth), targeted, strict=True)


def settled(resolver: Resolver, patch: Patch, parameter: str) -> Patch:
    """The patch with its parameter, and with the settings that PEFT's patterns give this parameter."""
    full = f"{patch.module}.{parameter}"
    is_named = any(ends_with(full, target) for target in resolver.config["target_parameters"])
    numbers = resolver.settings(full if is_named else patch.module)
    settings = {**patch.settings, **{key: numbers[key] for key in ("r", "alpha", "scaling")}}
    return replace(patch, parameter=parameter, settings=MappingProxyType(settings))


def require_complete(adapter: Adapter, base: BaseIndex, touched: frozenset[str]) -> None:
    """Check that the file has every target, saved module and bias that its config names.

    Raises:
        InvalidInput: naming the first of them.
    """
    for problem, absent in (
        ("targets in the base without tensors in the adapter", _targets(adapter, base, touched)),
        ("modules_to_save without tensors in the adapter", _saved(adapter, base, touched)),
        ("biases that the config trains, without tensors in the adapter", _biases(adapter, base)),
    ):
        if listed := [quote(name) for name in absent]:
            raise InvalidInput(f"{problem}: {enumerated(listed, 3)}", str(adapter.container.path), REMEDY)


def _targets(adapter: Adapter, base: BaseIndex, touched: frozenset[str]) -> Iterator[str]:
    """Modules that a list of targets names, by PEFT's rule, and that the file lacks."""
    listed = adapter.config.get("target_modules")
    if not isinstance(listed, list) or not all(is_absent(adapter.config.get(field)) for field in NARROWED):
        return
    for weight in base.names.weights:
        is_touched = weight.label in touched or weight.tied_with in touched
        if weight.is_module and not is_touched and any(ends_with(weight.label, end) for end in listed):
            yield weight.label


def _saved(adapter: Adapter, base: BaseIndex, touched: frozenset[str]) -> Iterator[str]:
    """Parameters of saved modules that the file lacks, also under the name of a tied module."""
    saved = declared(adapter.config)
    if not saved:
        return
    for name, slot in base.names.slots.items():
        # an adapter of an older transformers may have the module's name on disk
        is_held = not touched.isdisjoint({slot.module, slot.tied_with, name.rpartition(".")[0]})
        if not is_held and any(ends_with_name(slot.module, end) for end in saved):
            yield f"{slot.module}.{slot.parameter}"


def _biases(adapter: Adapter, base: BaseIndex) -> Iterator[str]:
    """Biases that the config trains and that the file lacks. Masks in old files, also named bias, are not vectors."""
    which = adapter.config.get("bias") or "none"
    if which == "none":
        return
    replaced = {replacement.parameter for replacement in adapter.replacements}
    patched = {base.memory_name(patch.module) for patch in adapter.patches}
    for name, slot in base.names.slots.items():
        is_bias = slot.parameter == "bias" and len(base.shapes[name]) == 1
        is_trained = which == "all" or slot.module in patched
        if is_bias and is_trained and replaced.isdisjoint({f"{slot.module}.bias", name}):
            yield f"{slot.module}.bias"
