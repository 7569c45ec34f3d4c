"""LOOK, at adapters: what one does to every weight, from its own file and, where that is not enough, from the base.

Products are never formed: of a sum of low-rank terms the singular values come from the factors; anything else is
looked at some rows at a time.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from kasa_cli.checkpoint.adapter import UNKNOWN_PARAMETER, Adapter, Patch
from kasa_cli.checkpoint.adapter_places import Placed
from kasa_cli.checkpoint.adapter_shapes import TRANSPOSED, bound
from kasa_cli.checkpoint.layout import Checkpoint
from kasa_cli.checkpoint.open_files import OpenFiles
from kasa_cli.methods import adapters as kinds
from kasa_cli.methods import learned
from kasa_cli.methods.learned import Factors, Update
from kasa_cli.pipeline.patches import LOST, expert_changes, label, matrix_of, needs_weight, weight_under
from kasa_cli.pipeline.weights import Matrix

NEEDS_BASE = "not known without the base: give --base"
START_IS_LOST = "its start took something off the base that is not in the file"


@dataclass(frozen=True)
class Item:
    """A patch of an adapter and, if there is a base, where it goes."""

    patch: Patch
    place: Placed | None = None

    @property
    def name(self) -> str:
        """The module or its parameter; where only the base could tell which, the path that the file has."""
        patch = self.patch
        if patch.parameter == UNKNOWN_PARAMETER:
            return patch.module + ".base_layer" * patch.depth
        return label(patch)

    @property
    def is_stack(self) -> bool:
        """Whether it is about a parameter, which may hold several experts; only LoRA is there."""
        is_parameter = self.patch.parameter != "weight" and self.patch.kind == "lora"
        return is_parameter or (self.place is not None and len(self.place.matrices) > 1)

    @property
    def num_bytes(self) -> int:
        """Of the weight in float64, if it is read at all."""
        return 8 * math.prod(self.place.shape) if self.place and not self.is_stack else 0

    @property
    def matrix(self) -> Matrix | None:
        """The weight in the base's files, to ask about; None of experts, and of one whose pieces lie turned."""
        place = self.place
        if place is None or self.is_stack or (place.is_turned and len(place.matrices[0]) > 1):
            return None
        return matrix_of(place)


@dataclass(frozen=True)
class Opened:
    """An adapter, its file held open, and the base that it is looked at with, if any."""

    adapter: Adapter
    base: Checkpoint | None
    files: OpenFiles

    def tensors(self, patch: Patch) -> dict[str, Tensor]:
        """A patch's tensors by their short names.

        Raises:
            InvalidInput: a number in one of them is not finite.
        """
        return self.files.tensors(self.adapter.container, patch.tensors)

    def weight(self, item: Item) -> Tensor | None:
        """W under the adapter as (out, in): the one in the adapter's own file, or the base's."""
        place, patch = item.place, item.patch
        own = f"{patch.module}.weight"
        for one in self.adapter.replacements:
            if one.parameter == own and one.is_base:
                found = self.files.tensor(self.adapter.container, one.tensor)
                turned = place.is_transposed if place else not TRANSPOSED.isdisjoint(patch.tensors)
                return found.T if turned else found
        if place is None or self.base is None or item.is_stack:
            return None
        return weight_under(self.base, place)

    @property
    def has_patterns(self) -> bool:
        """Whether rank or alpha depend on names."""
        return any(self.adapter.config.get(f"{of}_pattern") for of in ("rank", "alpha"))


@dataclass(frozen=True)
class Look:
    """One patch under the lens."""

    opened: Opened
    item: Item
    tensors: Mapping[str, Tensor]

    @property
    def patch(self) -> Patch:
        """What the adapter says."""
        return self.item.patch

    @cached_property
    def shape(self) -> tuple[int, int] | None:
        """(out, in) as the adapter counts them; without a base, what its own tensors say of it."""
        if self.item.place:
            return self.item.place.sides
        shapes = {short: tuple(tensor.shape) for short, tensor in self.tensors.items()}
        letters = bound(self.patch.kind, self.patch.settings, shapes, {}, self.patch.tensors)
        if self.patch.kind == "lokr":
            return letters["a"] * letters["b"], letters["c"] * letters["d"]
        return (letters["o"], letters["i"]) if {"o", "i"} <= letters.keys() else None

    @cached_property
    def num_matrices(self) -> int | None:
        """How many experts there are; None where rank and number cannot be told apart without the base."""
        if self.item.place:
            return len(self.item.place.matrices)
        if not self.item.is_stack:
            return 1
        num_rows, r = len(self.tensors["lora_A"]), self.patch.settings["r"]
        return None if self.opened.has_patterns or num_rows % r else num_rows // r

    def pairs(self) -> Iterable[Factors | None]:
        """The two factors of each matrix, of kinds that have two."""
        if self.num_matrices is None:
            return [None]
        if self.item.is_stack:
            A, B = (self.tensors[f"lora_{letter}"] for letter in "AB")
            return learned.expert_pairs(A, B, self.num_matrices)
        return [learned.pair(self.patch.kind, self.tensors, self.shape)]

    def updates(self) -> Iterable[Update | str]:
        """What the adapter does to each matrix, or why that is not known; of experts one at a time."""
        if self.num_matrices is None or self.shape is None:
            return [NEEDS_BASE]
        if self.patch.settings.get("base_start") == LOST:
            return [START_IS_LOST] * self.num_matrices
        is_transposed = self.item.place is not None and self.item.place.is_transposed
        shape = self.shape
        module = kinds.Module(*shape, self.patch.settings, is_transposed)
        if self.item.is_stack:
            made = expert_changes(self.tensors, module, self.num_matrices)
            return (learned.update(change, None, shape) for change in made)
        return [self._update(module)]

    def _update(self, module: kinds.Module) -> Update | str:
        """The weight is read only where the change depends on it."""
        needs = needs_weight(self.patch)
        W = self.opened.weight(self.item) if needs else None
        if needs and W is None:
            return NEEDS_BASE
        change = kinds.change(self.patch.kind, self.tensors, module, W)
        if change.map is not None and W is None:
            W = self.opened.weight(self.item)
            if W is None:
                return NEEDS_BASE
        return learned.update(change, W, (module.out_features, module.in_features))
