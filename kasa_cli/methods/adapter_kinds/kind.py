"""What a row of the table of adapter kinds is: how its files are read, what it does to a weight, and its traits.

Shapes are written with letters (see `shapes`); the letters of tensors are those of the formula.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from jaxtyping import Float
from torch import Tensor

from kasa_cli.errors import InvalidInput
from kasa_cli.methods.adapter_kinds.change import Change, Term
from kasa_cli.methods.adapter_kinds.config_fields import Field

Settings = Mapping[str, Any]
Sizes = dict[str, int]
Test = Callable[[Settings], bool]


def always(_settings: Settings) -> bool:
    """A trait that holds whatever the settings."""
    return True


def never(_settings: Settings) -> bool:
    """A trait that holds for no settings."""
    return False


class BaseChange(StrEnum):
    """What the initialisation of an adapter did to the weight under it."""

    NONE = "none"
    RECOMPUTED = "recomputed"
    """It subtracted something that is computed again from the original base."""
    LOST = "lost"
    """It subtracted something random or data-driven, which no file holds."""
    IN_FILE = "in file"
    """The adapter's file holds the weight as the initialisation left it."""
    IN_FACTORS = "in factors"
    """It subtracted the product of frozen factors that the adapter's file holds."""


@dataclass(frozen=True)
class Module:
    """One module of a model: the sides of its weight as it multiplies, and the settings resolved for it.

    The weight is W (out_features x in_features) with h = W x. Weights stored the other way round are seen through
    their transpose: `Conv1D`, an expert stored (in, out), and an embedding, whose in_features is its vocabulary.
    """

    out_features: int
    in_features: int
    settings: Settings = field(default_factory=dict)
    is_transposed: bool = False


@dataclass(frozen=True)
class Spec:
    """A tensor of a kind: its shape in letters ("r i"; "r|r r" for either), and its names after the module's.

    Several names are those for several types of modules, in the same order in all tensors of a kind. An optional
    tensor is needed if `when` says so of the config. A shared tensor serves all modules.
    """

    shape: str | Callable[[Settings], str]
    names: tuple[str, ...]
    is_optional: bool = False
    is_shared: bool = False
    when: Test = never

    def shape_for(self, settings: Settings) -> str:
        """The shape under these settings."""
        return self.shape if isinstance(self.shape, str) else self.shape(settings)


def spec(shape: str | Callable[[Settings], str], *names: str, **traits: Any) -> Spec:
    """A tensor of this shape, under any one of these names."""
    return Spec(shape, names, **traits)


@dataclass(frozen=True)
class Setting:
    """A setting of a kind: its type, and its default; ... if it has none."""

    type: type
    default: Any = ...


ALPHA = {"r": Setting(int), "alpha": Setting(float)}
SCALING = {**ALPHA, "use_rslora": Setting(bool, False)}


def alpha_over_rank(settings: Settings) -> float:
    """The scaling alpha / r."""
    return float(settings["alpha"] / settings["r"])


@dataclass(frozen=True)
class Inputs:
    """The input of a formula: the tensors by letter, the module, its settings, the weight under the adapter."""

    kind: "Kind"
    tensors: Mapping[str, Tensor]
    module: Module
    settings: Settings
    weight: Float[Tensor, "o i"] | None
    is_embedding: bool

    def __getitem__(self, letter: str) -> Tensor:
        return self.tensors[letter].double()

    def get(self, letter: str) -> Tensor | None:
        """A tensor that may be missing, in float64."""
        return self[letter] if letter in self.tensors else None

    @property
    def scaling(self) -> float:
        """The factor before the product."""
        return self.kind.scaling(self.settings) if self.kind.scaling else 1.0

    @property
    def W(self) -> Float[Tensor, "o i"]:  # noqa: N802
        """The weight under the adapter, as it was before any change."""
        if self.weight is None:
            raise InvalidInput("this kind of adapter needs the weight under it")
        return self.weight


@dataclass(frozen=True)
class Initialisation:
    """Values of `init_lora_weights` (a pattern, in lower case), and what PEFT does to the base for them.

    A plain LoRA with it is of `kind`, where that is not "". `subtracted` are the terms that PEFT subtracts from the
    base whenever it loads the adapter. `refusal` and `remedy` are for bases that are lost.
    """

    values: str
    base: BaseChange = BaseChange.NONE
    kind: str = ""
    subtracted: Callable[[Inputs], tuple[Term, ...]] | None = None
    refusal: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class ConfigType:
    """The configs of one type: values of PEFT's `peft_type` or lora-lite's `variant`, and the rules for the fields.

    `rank` and `alpha` name fields, "" where there is none. Both are `required`, beside those listed. `settings`
    fields become settings as they are. `has_patterns`: PEFT's patterns give modules other ranks and alphas.
    """

    names: tuple[str, ...]
    fields: Mapping[str, Field]
    rank: str = "r"
    alpha: str = ""
    required: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    has_patterns: bool = True
    initialisations: tuple[Initialisation, ...] = ()

    @property
    def needed(self) -> tuple[str, ...]:
        """The fields that a config must have."""
        return (*filter(None, (self.rank, self.alpha)), *self.required)


@dataclass(frozen=True)
class Kind:
    """A kind of adapter, under its name in reports and manifests. All that kasa knows of it stands here.

    To read it:
        config: the type of its configs; `is_named` picks the kind where several have one type.
        tensors: by letter. `groups` are the sets of tensors of which a module has one, where they do not follow.
        rule: what the sizes must satisfy beside their shapes; a sentence if they do not.
        read_sizes: sizes that the config gives for a module, by the module's name.
        read_settings: settings that the shapes tell more surely than the config.
        contradiction: a sentence if the config contradicts the settings of a module, by the module's name.
        sides: (o, i) from the sizes, where they are known.

    To apply it:
        change: the formula, from `tensors` and `settings`. `needs_weight`: it depends on the weight as it was.
        scaling: the factor before the product; `learned_scaling` is the letter of a tensor that is r times that.

    Its traits:
        factors: the letters of its pair of factors, (r x i) and (o x r).
        diagonal: the letter of the diagonal that it learns.
        is_low_rank: whether its change is a sum of low-rank terms, at the latest once the weight is known.
        changes_bias: whether it multiplies the bias of its module too.
        base: how its initialisation changed the weight under it; LoRA's `ConfigType.initialisations` decide it there.
        on_changed_base: the kind that it is on a base as its initialisation left it.
        truncates_base: whether the smallest components of the base are dropped for it.
        holds_experts: whether PEFT applies it to parameters of fused experts.
    """

    name: str
    config: ConfigType
    tensors: Mapping[str, Spec]
    change: Callable[[Inputs], Change]
    settings: Mapping[str, Setting] = field(default_factory=dict)
    needs_weight: bool = False
    scaling: Callable[[Settings], float] | None = None
    learned_scaling: str = ""
    is_named: Test = never
    groups: tuple[tuple[str, ...], ...] = ()
    rule: Callable[[Sizes, Settings], str | None] = lambda sizes, settings: None
    read_sizes: Callable[[Settings, str], Sizes] = lambda config, module: {}
    read_settings: Callable[[Mapping[str, tuple[int, ...]]], Settings] = lambda shapes: {}
    contradiction: Callable[[Settings, str, Settings], str | None] = lambda config, module, settings: None
    sides: Callable[[Sizes], tuple[int, int] | None] = lambda sizes: (
        (sizes["o"], sizes["i"]) if {"o", "i"} <= sizes.keys() else None
    )
    factors: tuple[str, str] | None = None
    diagonal: str = ""
    is_low_rank: Test = always
    changes_bias: Test = never
    base: BaseChange = BaseChange.NONE
    on_changed_base: str = ""
    truncates_base: bool = False
    holds_experts: bool = False

    @property
    def names(self) -> frozenset[str]:
        """Every name that a tensor of this kind may have, after that of its module."""
        return frozenset(name for spec in self.tensors.values() for name in spec.names)

    @property
    def shared(self) -> tuple[str, ...]:
        """The names of tensors that serve all modules."""
        return tuple(name for spec in self.tensors.values() if spec.is_shared for name in spec.names)

    def groups_for(self, config: Settings) -> tuple[tuple[str, ...], ...]:
        """The sets of tensor names of which a module has exactly one, under this config."""
        if self.groups:
            return self.groups
        needed = [tensor.names for tensor in self.tensors.values() if _is_needed(tensor, config)]
        count = max(map(len, needed), default=0)
        return tuple(tuple(names[min(n, len(names) - 1)] for names in needed) for n in range(count))

    def tensor(self, letter: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """The tensor of a letter, under any of its names."""
        names = self.tensors[letter].names if letter in self.tensors else ()
        return next((tensors[name] for name in names if name in tensors), None)


def _is_needed(tensor_spec: Spec, config: Settings) -> bool:
    return not tensor_spec.is_shared and (tensor_spec.when(config) if tensor_spec.is_optional else True)


def is_of_embedding(names: Mapping[str, Any]) -> bool:
    """Whether tensors of these short names belong to an embedding, whose product is the transpose of its weight."""
    return any("_embedding_" in name for name in names)


def settings_of(kind: Kind, module: Module) -> dict[str, Any]:
    """The settings that a formula reads, each checked.

    Raises:
        InvalidInput: naming the setting that is missing or has no sound value.
    """
    return {name: _setting(name, rule, module.settings) for name, rule in kind.settings.items()}


def _setting(name: str, rule: Setting, settings: Settings) -> Any:
    """A setting of its type: numbers finite, whole ones positive."""
    value = settings.get(name, rule.default)
    if value is ...:
        raise InvalidInput("a setting is missing", name)
    if rule.type is object:
        return value
    types = (int, float) if rule.type is float else rule.type
    is_right = isinstance(value, types) and isinstance(value, bool) == (rule.type is bool)
    if is_right and rule.type in (int, float):
        is_right = math.isfinite(value) and (rule.type is float or value > 0)
    if not is_right:
        raise InvalidInput(f"{value!r} is no value for a setting", name)
    return value
