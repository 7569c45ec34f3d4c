"""Is all there that a config says an adapter holds? Asked of the base, whose modules a config names by their ends.

PEFT warns of missing keys and goes on with what the base has. Here a target, a parameter saved whole or a bias that
the file says nothing about stops the run by name.
"""

from collections.abc import Iterator

from kasa_cli.checkpoint.adapter import Adapter
from kasa_cli.checkpoint.adapter_base import Base
from kasa_cli.checkpoint.adapter_fields import is_absent
from kasa_cli.checkpoint.adapter_names import ends_with
from kasa_cli.checkpoint.adapter_values import declared, ends_with_name
from kasa_cli.checkpoint.layout import enumerated
from kasa_cli.checkpoint.untrusted import quote
from kasa_cli.errors import InvalidInput

REMEDY = "the file is incomplete, or of another base"
NARROWED = ("exclude_modules", "layers_to_transform")


def require_complete(adapter: Adapter, base: Base, touched: frozenset[str]) -> None:
    """No module or parameter of the base is named by the config and left out of the file.

    Raises:
        InvalidInput: naming the first of them.
    """
    for what, absent in (
        ("targets in the base without tensors in the adapter", _targets(adapter, base, touched)),
        ("modules_to_save without tensors in the adapter", _saved(adapter, base, touched)),
        ("biases of the base that the config says are trained, not in the adapter", _biases(adapter, base)),
    ):
        if listed := [quote(name) for name in absent]:
            raise InvalidInput(f"{what}: {enumerated(listed, 3)}", str(adapter.container.path), REMEDY)


def _targets(adapter: Adapter, base: Base, touched: frozenset[str]) -> Iterator[str]:
    """Modules that a list of targets, taken as PEFT takes it, names."""
    listed = adapter.config.get("target_modules")
    if not isinstance(listed, list) or not all(is_absent(adapter.config.get(field)) for field in NARROWED):
        return
    for weight in base.names.weights:
        is_touched = weight.label in touched or weight.tied_with in touched
        if weight.is_module and not is_touched and any(ends_with(weight.label, end) for end in listed):
            yield weight.label


def _saved(adapter: Adapter, base: Base, touched: frozenset[str]) -> Iterator[str]:
    """Parameters of modules that PEFT saves whole; what a module is tied with may stand for it."""
    saved = declared(adapter.config)
    if not saved:
        return
    for name, slot in base.names.slots.items():
        # an adapter of an older transformers may have the module's name on disk
        is_held = not touched.isdisjoint({slot.module, slot.tied_with, name.rpartition(".")[0]})
        if not is_held and any(ends_with_name(slot.module, end) for end in saved):
            yield f"{slot.module}.{slot.parameter}"


def _biases(adapter: Adapter, base: Base) -> Iterator[str]:
    """Biases of all modules, or of those that a patch is for. A mask that old files call a bias is no vector."""
    which = adapter.config.get("bias") or "none"
    if which == "none":
        return
    held = {one.parameter for one in adapter.replacements}
    patched = {base.memory_name(patch.module) for patch in adapter.patches}
    for name, slot in base.names.slots.items():
        is_bias = slot.parameter == "bias" and len(base.shapes[name]) == 1
        is_trained = which == "all" or slot.module in patched
        if is_bias and is_trained and held.isdisjoint({f"{slot.module}.bias", name}):
            yield f"{slot.module}.bias"
