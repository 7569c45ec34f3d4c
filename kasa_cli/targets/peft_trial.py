"""Tests a trainer config: PEFT wraps the model without weights, and its wrappers must be the selection.

PEFT rewrites names by rules that change with its releases, so no reading of its documents can stand for this. It is
an optional dependency: without it there is no trial, and the report says so.
"""

import importlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from kasa_cli.errors import IntegrityError
from kasa_cli.model_names import Shapes, UnknownFamily, meta_model
from kasa_cli.targets.trainer_configs import Chosen

Wrapped = tuple[frozenset[str], frozenset[str]]
"""Paths of modules and of parameters."""


def check(chosen: Chosen, lora: Mapping[str, Any], config: Mapping[str, Any], shapes: Shapes) -> str | None:
    """The version of PEFT that wraps exactly the selection, given `lora`; None without PEFT or without a model.

    `IntegrityError` names what PEFT leaves out and what it takes too.
    """
    try:
        peft = loaded()
        modules, parameters = wrapped(config, shapes, lora)
    except (ImportError, UnknownFamily):
        return None
    actual, expected = modules | parameters, {*chosen.modules, *chosen.parameters}
    if actual != expected:
        missing, extra = listed("leaves out", expected - actual), listed("takes", actual - expected)
        raise IntegrityError(
            f"peft {peft.__version__} does not wrap the selection",
            " and ".join(part for part in (missing, extra) if part),
            "use another --emit, or leave such modules out (--exclude)",
        )
    return f"peft {peft.__version__}"


def listed(verb: str, names: Iterable[str], most: int = 3) -> str:
    """A few names as text.

    >>> listed("takes", {"a", "b", "c", "d"})
    'takes a, b, c and 1 more'
    """
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return f"{verb} {', '.join(ordered[:most])}{more}" if ordered else ""


def wrapped(config: Mapping[str, Any], shapes: Shapes, lora: Mapping[str, Any]) -> Wrapped:
    """The modules and parameters that PEFT wraps in the model of a config, on the meta device, given `lora`.

    A matrix that is wrapped as a parameter counts as its module.
    """
    peft = loaded()
    model = meta_model.build(config, shapes)
    with meta_model.quiet(), torch.device("meta"):
        try:
            peft.inject_adapter_in_model(peft.LoraConfig(**lora), model, low_cpu_mem_usage=True)
        except Exception as error:  # PEFT has no error of its own for a LoRA that does not fit a model
            version, reason = peft.__version__, meta_model.first_line(error)
            raise IntegrityError(
                f"peft {version} refuses the selection", reason, "use another --emit"
            ) from error
        layers = list(adapted(model, peft))
        refuse_odd_layers(layers)
    modules = frozenset(layer.path for layer in layers if layer.parameter is None)
    parameters = (f"{layer.path}.{layer.parameter}" for layer in layers if layer.parameter is not None)
    return modules, frozenset(parameters)


def loaded() -> Any:
    """The module `peft`, untyped: it may be absent."""
    with meta_model.quiet():
        return importlib.import_module("peft")


class WrappedLayer(NamedTuple):
    """The module that a wrapper wraps or, where the module is more than a matrix, one parameter of it."""

    path: str
    parameter: str | None
    module: nn.Module


def adapted(model: nn.Module, peft: Any) -> Iterator[WrappedLayer]:
    """Every wrapper that PEFT put into a model."""
    layer, of_parameter = peft.tuners.tuners_utils.BaseTunerLayer, peft.tuners.lora.layer.ParamWrapper
    wrappers = {path: module for path, module in model.named_modules() if isinstance(module, layer)}
    for path, module in wrappers.items():
        outer = path
        while outer.endswith(".base_layer") and outer.removesuffix(".base_layer") in wrappers:
            outer = outer.removesuffix(".base_layer")  # two parameters of one module: a wrapper in a wrapper
        is_matrix = not isinstance(module, of_parameter) or (
            module.parameter_name == "weight" and module.get_param().ndim == 2
        )
        yield WrappedLayer(outer, None if is_matrix else module.parameter_name, module.get_base_layer())


def refuse_odd_layers(layers: Iterable[WrappedLayer]) -> None:
    """Refuse a linear map that gives back more than its product, as Llama 4's router does: PEFT wraps it, and
    the first step of the training fails."""
    for layer in layers:
        if isinstance(layer.module, nn.Linear) and not gives_a_product(layer.module):
            problem = f"PEFT cannot train a {type(layer.module).__name__}"
            raise IntegrityError(problem, layer.path, f"--exclude {layer.path.rpartition('.')[2]}")


def gives_a_product(linear: nn.Linear) -> bool:
    """Whether a module returns one tensor. A module that needs more than one input is assumed to."""
    if type(linear).forward is nn.Linear.forward:
        return True
    try:
        product = linear(torch.empty(1, linear.in_features, device="meta"))
    except Exception:  # a forward of its own may ask for anything
        return True
    return isinstance(product, torch.Tensor)
