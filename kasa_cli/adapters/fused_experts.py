"""A plain LoRA on parameters of fused experts, in PEFT's layout for `target_parameters`.

PEFT nests the wrappers of a module's parameters, the first parameter innermost, and names tensors by the nesting.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import Tensor

from kasa_cli.adapters import peft
from kasa_cli.adapters.placement import holds_experts_in_out
from kasa_cli.adapters.writing import FactorEntry, StackMember
from kasa_cli.model_names import split_name


def wrapper_names(parameters: Sequence[str]) -> dict[str, str]:
    """The wrapper that PEFT makes for each parameter, given in the order of the model.

    >>> wrapper_names(["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])["mlp.experts.gate_up_proj"]
    'mlp.experts.base_layer'
    """
    by_module: defaultdict[str, list[str]] = defaultdict(list)
    for parameter in parameters:
        by_module[split_name(parameter)[0]].append(parameter)
    return {
        parameter: module + ".base_layer" * depth
        for module, own in by_module.items()
        for depth, parameter in enumerate(reversed(own))
    }


def stack_entry(
    parameter: str, wrapper: str, num_experts: int, shape: tuple[int, int], model_class: str | None
) -> FactorEntry:
    """The pair of tensors of a parameter; `shape` is the shape of one expert in memory."""
    is_in_out = holds_experts_in_out(model_class or "")
    names = peft.tensor_names(wrapper)
    members = tuple(StackMember(number, 0, shape[0]) for number in range(num_experts))
    sides = (shape[1], shape[0]) if is_in_out else shape
    return FactorEntry(parameter, names["A"], names["B"], sides, members, is_in_out, is_parameter=True)


def expert_factors(entry: FactorEntry, tensors: Mapping[str, Tensor], number: int) -> tuple[Tensor, Tensor]:
    """The factors (left, right) of one expert, whose product is added to it in memory."""
    num_experts = len(entry.members)
    A, B = tensors[entry.A], tensors[entry.B]
    rank = len(A) // num_experts
    A, B = A[number * rank : (number + 1) * rank], B.reshape(len(B), rank, num_experts)[:, :, number]
    return (A.T, B.T) if entry.is_turned else (B, A)
