"""Files of tensors that stay open while a run needs them.

safetensors reads the whole header each time a file is opened: for an adapter of many experts, which has tens of
thousands of tensors, that takes longer than all that is done with the tensors of one patch.
"""

import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from kasa_cli.checkpoint.safetensors_file import Container, Reader
from kasa_cli.errors import InvalidInput


class OpenFiles:
    """Opens each file at its first read. Threads may share it: one of them reads at a time."""

    def __init__(self) -> None:
        self._readers: dict[Path, Reader] = {}
        self._open = ExitStack()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def tensor(self, container: Container, name: str) -> Tensor:
        """One tensor of a file, in memory of its own."""
        return self.tensors(container, {name: name})[name]

    def tensors(self, container: Container, names: Mapping[str, str]) -> dict[str, Tensor]:
        """Tensors of a file, by the names that lead to theirs: those of a patch, by its short ones.

        Raises:
            InvalidInput: a number in one of them is not finite.
        """
        with self._lock:
            if container.path not in self._readers:
                self._readers[container.path] = self._open.enter_context(Reader(container))
            reader = self._readers[container.path]
            tensors = {short: reader.tensor(name) for short, name in names.items()}
        for short, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise InvalidInput("a tensor with numbers that are not finite", names[short])
        return tensors
