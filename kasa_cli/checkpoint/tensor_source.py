"""Where the bytes of tensors come from: the protocol that a safetensors file and a checkpoint implement.

Another place (ranged reads over the network) or another storage format (quantized tensors) is another class.
"""

from collections.abc import Iterator, Mapping
from typing import Protocol

from torch import Tensor

from kasa_cli.checkpoint.safetensors_file import TensorEntry


class TensorSource(Protocol):
    """Tensors by name. Every read raises IntegrityError when the bytes are no longer those of the headers."""

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """The header: every tensor with its dtype and shape."""

    def tensor(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Entries [start, stop) along the first side of a tensor; no other byte of it is read."""

    def chunks(self, name: str, size: int = ...) -> Iterator[memoryview]:
        """The raw bytes of one tensor, each chunk in the same memory: use it before the next."""
