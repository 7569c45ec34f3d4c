"""The sizes that the letters of a kind's shapes stand for, found from the shapes of one module's tensors.

Letters: o, i = out_features and in_features as the adapter counts them, r = rank. Any other letter takes the size
that it meets first and keeps it in all tensors of the module.
"""

from collections.abc import Mapping, Sequence

from kasa_cli.errors import InvalidInput
from kasa_cli.methods.adapter_kinds.kind import Kind, Settings, Sizes

MAY_BE_ZERO = frozenset("ne")
"""Letters that may be 0: the components left of a pruned AdaLoRA, the free entries of blocks of side 1."""


def sizes_of(
    kind: Kind,
    settings: Settings,
    shapes: Mapping[str, tuple[int, ...]],
    known: Mapping[str, int],
    names: Mapping[str, str],
) -> Sizes:
    """The size of every letter, starting from `known` ones. `names` are the tensors' names in the file.

    Raises:
        InvalidInput: a tensor does not fit; names it as in the file.
    """
    sizes = dict(known)
    for spec in kind.tensors.values():
        for short in spec.names:
            if short in shapes:
                sizes = _fit(spec.shape_for(settings), shapes[short], sizes, names[short])
    empty = [letter for letter, size in sizes.items() if not size and letter not in MAY_BE_ZERO]
    problem = f"{empty[0]} is 0" if empty else kind.rule(sizes, settings)
    if problem:
        raise InvalidInput(f"does not fit: {problem}", next(iter(names.values())))
    return sizes


def _fit(forms: str, shape: tuple[int, ...], sizes: Sizes, name: str) -> Sizes:
    """The sizes with those of one more tensor, in the first form that it fits."""
    alternatives = [form.split() for form in forms.split("|")]
    alternatives = [form for form in alternatives if len(form) == len(shape)] or alternatives
    for form in alternatives:
        if (fitted := _sizes_with(form, shape, sizes)) is not None:
            return fitted
    expected = " or ".join(_expected(form, sizes) for form in alternatives)
    raise InvalidInput(f"shape {list(shape)}, expected {expected}", name)


def _sizes_with(form: Sequence[str], shape: tuple[int, ...], sizes: Sizes) -> Sizes | None:
    """The sizes with those of a tensor of this form; None if its shape is another.

    >>> _sizes_with(["r", "i"], (4, 24), {"i": 24}), _sizes_with(["r", "r"], (4, 24), {})
    ({'i': 24, 'r': 4}, None)
    """
    if len(form) != len(shape):
        return None
    fitted = dict(sizes)
    for letter, size in zip(form, shape, strict=True):
        if (int(letter) if letter.isdecimal() else fitted.setdefault(letter, size)) != size:
            return None
    return fitted


def _expected(form: Sequence[str], sizes: Sizes) -> str:
    """A form in words, with the sizes that are known.

    >>> _expected(["r", "i", "1"], {"r": 4})
    '(r = 4, i, 1)'
    """
    return f"({', '.join(f'{letter} = {sizes[letter]}' if letter in sizes else letter for letter in form)})"
