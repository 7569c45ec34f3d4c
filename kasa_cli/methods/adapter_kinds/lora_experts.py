"""LoRA on a parameter of fused experts. Shapes: e = number of experts, r = adapter rank, n = e r."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from kasa_cli.errors import InvalidInput
from kasa_cli.methods.adapter_kinds.change import Change, transposed
from kasa_cli.methods.adapter_kinds.inputs import inputs_of
from kasa_cli.methods.adapter_kinds.kind import Module, Spec, spec
from kasa_cli.methods.adapter_kinds.lora import LORA, lora

STACKED = replace(LORA, tensors={"A": spec("n i", "lora_A"), "B": spec("o n", "lora_B")})


def experts(
    tensors: Mapping[str, Tensor], module: Module, num_experts: int, peft_version: str
) -> list[Change]:
    """LoRA on a parameter of fused experts, a change for each; `module` is one expert, W its (out x in) view.

    A (e r x i) holds one expert after another, B (o x r e) one rank after another:
    W_k' = W_k + s B[:, k::e] A[k r : (k + 1) r]. See `are_sides_swapped` for files of PEFT before 0.19.
    """
    A_name, B_name = (_the_name(tensors, STACKED.tensors[letter]) for letter in "AB")
    sides = tensors[A_name].shape[-1], tensors[B_name].shape[0]
    is_swapped = are_sides_swapped(sides, module, peft_version)
    if is_swapped:
        module = replace(module, out_features=module.in_features, in_features=module.out_features)
    x = inputs_of(STACKED, tensors, module, None)
    r = x.settings["r"]
    if len(x.tensors["A"]) != num_experts * r:
        raise InvalidInput(f"{len(x.tensors['A'])} rows for {num_experts} experts of rank {r}", A_name)
    A, B = x.tensors["A"].reshape(num_experts, r, -1), x.tensors["B"].reshape(-1, r, num_experts)
    each = (lora(replace(x, tensors={"A": A[k], "B": B[:, :, k]})) for k in range(num_experts))
    return [transposed(change) if is_swapped else change for change in each]


def are_sides_swapped(sides: tuple[int, int], module: Module, peft_version: str) -> bool:
    """Whether A has the outputs and B the inputs of an expert, from the sides of A and B.

    PEFT before 0.19 took every parameter for (e, in, out). The shapes tell, unless the experts are square.

    >>> are_sides_swapped((8, 4), Module(4, 8), "0.18.1"), are_sides_swapped((4, 8), Module(4, 8), "0.18.1")
    (False, True)
    >>> [are_sides_swapped((8, 8), Module(8, 8), version) for version in ("0.18.1", "0.19.0", "0.21.2.dev0")]
    [True, False, False]
    >>> are_sides_swapped((8, 8), Module(8, 8, is_transposed=True), "0.18.1")
    False
    """
    if module.in_features != module.out_features:
        return sides == (module.out_features, module.in_features)
    if module.is_transposed:
        return False
    release = peft_version.split(".")[:2]
    if len(release) < 2 or not all(part.isdecimal() for part in release):
        raise InvalidInput("square experts, whose orientation depends on the release of PEFT", "peft_version")
    return tuple(map(int, release)) < (0, 19)


def _the_name(tensors: Mapping[str, Tensor], tensor_spec: Spec) -> str:
    name = next((name for name in tensor_spec.names if name in tensors), None)
    if name is None or tensors[name].ndim != 2:
        raise InvalidInput("a matrix is missing", tensor_spec.names[0])
    return name
