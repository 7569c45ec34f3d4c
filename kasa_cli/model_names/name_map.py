"""Maps each tensor on disk to the module in memory that owns it.

transformers and PEFT name modules as they are in memory; files keep the names of earlier layouts, store every
expert by itself, and leave out a tied head. The translation is transformers' own, on a model without weights.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kasa_cli.errors import InvalidInput, printable
from kasa_cli.model_names import meta_model
from kasa_cli.model_names.conversion import LoadedTensor, compositions, loaded_tensors
from kasa_cli.model_names.experts import Composition
from kasa_cli.model_names.names import ModuleKind, NameMap, Shapes, Slot, UnknownFamily, Weight, split_name


def map_names(config: Mapping[str, Any], shapes: Shapes) -> NameMap:
    """Find the slot of every tensor on disk, from its name and shape alone.

    When transformers has no class for the config, the names are taken for those in memory: `note` says why.
    """
    try:
        model = meta_model.build(config, shapes)
    except UnknownFamily as reason:
        note = f"names in memory are taken to be those on disk: {printable(str(reason))}"
        slots = assumed_slots(shapes)
        return NameMap(None, note, slots, (), assumed_weights(shapes, slots))
    modules = ModelModules(model)
    loaded = loaded_tensors(model, shapes)
    if config.get("quantization_config") is None:  # a packed tensor has another shape than what it unpacks to
        check_shapes(modules, loaded, shapes)
    slots = {name: modules.slot(name, loaded.get(name)) for name in shapes}
    weights = modules.weights(compositions(loaded))
    return NameMap(type(model).__name__, None, slots, modules.linear_modules(), weights)


def check_shapes(modules: "ModelModules", loaded: Mapping[str, LoadedTensor], shapes: Shapes) -> None:
    """Refuse weights that the config does not describe."""
    for name, tensor in loaded.items():
        expected, actual = tuple(modules.memory[tensor.name].shape), shapes[name]
        if (
            tensor.whole
            and expected != actual
            and modules.kind(split_name(tensor.name)[0]) != ModuleKind.OTHER
        ):
            problem = f"shape {actual} on disk, {expected} by config.json"
            raise InvalidInput(problem, name, "the config and the weights do not belong together")


def misfits(config: Mapping[str, Any], shapes: Shapes) -> list[str]:
    """The tensors on disk whose shape differs from the one by the config.

    Raises `UnknownFamily` when transformers has no class for it.
    """
    model = meta_model.build(config, shapes)
    memory = model.state_dict()
    return [
        name
        for name, tensor in loaded_tensors(model, shapes).items()
        if tensor.whole and tuple(memory[tensor.name].shape) != shapes[name]
    ]


# --- kinds of modules ---

ROUTER_CLASS = re.compile(r"Router|TopK|Gating$|MoE\w*Gate$")
ROUTER_NAMES = frozenset({"gate", "router", "shared_expert_gate"})


class ModelModules:
    """The modules of a model and their kinds."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.memory: dict[str, Tensor] = model.state_dict()
        self.modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self.unique = [path for path, _ in model.named_modules()]
        self.stacks = {name: p.shape for name, p in model.named_parameters() if p.dim() == 3}
        self.head = output_head(model)
        self.blocks = frozenset(block_paths(self.modules))
        self.routers = frozenset(
            p for p, m in self.modules.items() if p and ROUTER_CLASS.search(type(m).__name__)
        )
        self.expert_counts = frozenset(expert_counts(model.config.to_dict()))
        self.aliases = aliases(model)

    def slot(self, name: str, tensor: LoadedTensor | None) -> Slot:
        """The slot of a tensor on disk; `tensor` is None if transformers does not load it."""
        module, parameter = split_name(tensor.name if tensor else name)
        if tensor is None:
            return Slot(module, parameter, ModuleKind.OTHER, self.in_block(module), None)
        kind = self.kind(module)
        if not tensor.whole and kind != ModuleKind.EXPERTS:
            kind = ModuleKind.OTHER  # split, joined or reordered when loaded: not the matrix of the module
        return Slot(module, parameter, kind, self.in_block(module), self.tied_with(tensor.name))

    def kind(self, path: str) -> ModuleKind:
        """The kind of a module. Routers come first: many of them are linear maps."""
        module = self.modules[path]
        if self.is_router(path, module):
            return ModuleKind.ROUTER
        if module is self.head:
            return ModuleKind.HEAD
        for kind, kind_class in (
            (ModuleKind.LINEAR, nn.Linear),
            (ModuleKind.CONV1D, Conv1D),
            (ModuleKind.EMBEDDING, nn.Embedding),
        ):
            if isinstance(module, kind_class):
                return kind
        return ModuleKind.EXPERTS if is_experts(path, module) else ModuleKind.OTHER

    def is_router(self, path: str, module: nn.Module) -> bool:
        """Whether a module or one of its ancestors chooses experts."""
        if any(ancestor in self.routers for ancestor in ancestors(path)):
            return True
        leaf = split_name(path)[1]
        if not isinstance(module, nn.Linear) or leaf not in ROUTER_NAMES:
            return False
        return leaf == "shared_expert_gate" or module.out_features in self.expert_counts

    def in_block(self, path: str) -> bool:
        """Whether a module is inside one layer of a stack."""
        return any(ancestor in self.blocks for ancestor in ancestors(path))

    def tied_with(self, name: str) -> str | None:
        """Another module that holds the same parameter, the output head if it is one of them."""
        others = [split_name(other)[0] for other in self.aliases.get(name, ()) if other != name]
        others.sort(key=lambda path: self.modules.get(path) is not self.head)
        return others[0] if others else None

    def linear_modules(self) -> tuple[str, ...]:
        """Every linear map of the model, in the order of `named_modules`."""
        return tuple(path for path in self.unique if isinstance(self.modules[path], nn.Linear | Conv1D))

    def weights(self, made_of: Mapping[str, Composition]) -> tuple[Weight, ...]:
        """Every linear map and embedding, then every stack of matrices, with the tensors they are made of."""
        matrices = [
            self.weight(path, f"{path}.weight", weight.shape, made_of)
            for path in self.unique
            if isinstance(module := self.modules[path], nn.Linear | Conv1D | nn.Embedding)
            and isinstance(weight := module.weight, Tensor)
            and weight.dim() == 2
        ]
        return (*matrices, *(self.weight(name, name, shape, made_of) for name, shape in self.stacks.items()))

    def weight(self, label: str, name: str, shape: torch.Size, made_of: Mapping[str, Composition]) -> Weight:
        """A weight in memory, from its label and the name of the parameter that holds it."""
        module, is_module = split_name(name)[0], label != name
        is_linear = is_module and isinstance(self.modules[module], nn.Linear)
        facts = (self.kind(module), is_module, is_linear, self.in_block(module), self.tied_with(name))
        return Weight(label, tuple(shape), *facts, self.composition(name, made_of))

    def composition(self, name: str, made_of: Mapping[str, Composition]) -> Composition:
        """The tensors of a parameter: its own, or those of an alias."""
        return next((made_of[n] for n in (name, *self.aliases.get(name, ())) if n in made_of), Composition())


def ancestors(path: str) -> Iterator[str]:
    """A module's path and those of the modules it lies in.

    >>> list(ancestors("layers.0.mlp"))
    ['layers.0.mlp', 'layers.0', 'layers']
    """
    while path:
        yield path
        path = split_name(path)[0]


def block_paths(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """The entries of stacks, where an entry is itself made of modules: a list of heads is no stack."""
    for path, module in modules.items():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            yield from (f"{path}.{name}" for name, entry in module.named_children() if any(entry.children()))


def output_head(model: PreTrainedModel) -> nn.Module | None:
    """The module that computes logits over the vocabulary, if the model names one."""
    try:
        head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    except (NotImplementedError, AttributeError):
        return None
    return head if isinstance(head, nn.Module) else None


def is_experts(path: str, module: nn.Module) -> bool:
    """Whether a module holds the weights of several experts itself."""
    named = split_name(path)[1] == "experts" or "Expert" in type(module).__name__
    return named and any(True for _ in module.parameters(recurse=False))


def expert_counts(config: Mapping[str, Any]) -> Iterator[float]:
    """Every number of experts in a config."""
    for section in meta_model.sections(config):
        yield from (number for key, number in meta_model.numbers(section) if key.endswith("experts"))


def aliases(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """All names of each parameter that has several."""
    groups: defaultdict[int, dict[str, None]] = defaultdict(dict)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        groups[id(parameter)][name] = None
    for target, source in model.all_tied_weights_keys.items():
        if source in parameters:
            groups[id(parameters[source])][target] = None
    return {name: tuple(group) for group in groups.values() if len(group) > 1 for name in group}


# --- when the class is not known ---

HEAD_NAMES = frozenset({"lm_head", "embed_out", "score", "classifier"})


def assumed_slots(shapes: Shapes) -> dict[str, Slot]:
    """Slots derived from names and shapes alone."""
    slots = {}
    for name, shape in shapes.items():
        module, parameter = split_name(name)  # a bias is of its weight's kind
        kind = assumed_kind(module, shapes.get(f"{module}.weight", shape))
        slots[name] = Slot(module, parameter, kind, has_number(module), None)
    return slots


MATRIX_KINDS = frozenset({ModuleKind.LINEAR, ModuleKind.HEAD, ModuleKind.ROUTER, ModuleKind.EMBEDDING})


def assumed_weights(shapes: Shapes, slots: Mapping[str, Slot]) -> tuple[Weight, ...]:
    """Every apparent linear map or embedding, then every stack of matrices, in the order on disk."""
    weights = [assumed_weight(name, shapes[name], slot) for name, slot in slots.items()]
    return tuple(sorted((weight for weight in weights if weight), key=lambda weight: not weight.is_module))


def assumed_weight(name: str, shape: tuple[int, ...], slot: Slot) -> Weight | None:
    """The assumed weight in memory of a tensor on disk; None if it is no weight."""
    is_module = len(shape) == 2 and slot.parameter == "weight" and slot.kind in MATRIX_KINDS
    if not is_module and len(shape) != 3:
        return None
    label, is_linear = slot.module if is_module else name, is_module and slot.kind != ModuleKind.EMBEDDING
    return Weight(label, shape, slot.kind, is_module, is_linear, slot.in_block, None, Composition(((name,),)))


def assumed_kind(path: str, shape: tuple[int, ...]) -> ModuleKind:
    """The assumed kind of a module, from its path and the shape of its weight.

    >>> assumed_kind("h.0.mlp.up", (8, 4)).value, assumed_kind("wte", (9, 4)).value
    ('linear', 'embedding')
    """
    parts = path.split(".")
    if ROUTER_NAMES.intersection(parts):
        return ModuleKind.ROUTER
    if parts[-1] == "experts" or (len(shape) == 3 and "experts" in parts):
        return ModuleKind.EXPERTS
    if len(shape) != 2:
        return ModuleKind.OTHER
    if HEAD_NAMES.intersection(parts):
        return ModuleKind.HEAD
    if re.search("embed|wte|wpe", path):
        return ModuleKind.EMBEDDING
    return ModuleKind.LINEAR if has_number(path) else ModuleKind.OTHER


def has_number(path: str) -> bool:
    """Whether a path has a layer number."""
    return any(part.isdecimal() for part in path.split("."))
