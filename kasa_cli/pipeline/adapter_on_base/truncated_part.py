"""The part of a base that KaSA truncates: the number of components of each weight, and their factors.

The number is in the manifest beside an adapter; without a manifest it is the adapter's rank, as in PEFT. The factors
come from the tail that `kasa truncate` wrote, else from the store, else from a decomposition. The tail comes first so
that the result does not depend on the state of the store.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kasa_cli.adapters import peft
from kasa_cli.checkpoint import Checkpoint, Container, Matrix, TruncateManifest, hash_tensor, read_header
from kasa_cli.errors import IntegrityError, UsageError
from kasa_cli.files import sha256_file
from kasa_cli.methods.adapter_kinds import Term, truncation
from kasa_cli.pipeline.adapter_on_base.provenance import Origin, adapter_manifest
from kasa_cli.pipeline.measuring import Facts, weigh

TAIL = f"tail/{peft.WEIGHTS}"


@dataclass(frozen=True)
class Truncations:
    """The truncations in a manifest, by tensor on disk: the number of components, and the hash of the original.

    `tail` holds their factors, if it was written. `experts` are the truncated matrices of fused experts, which
    no KaSA adapter has.
    """

    ranks: Mapping[str, int] = field(default_factory=dict)
    originals: Mapping[str, str] = field(default_factory=dict)
    tail: Container | None = None
    experts: tuple[str, ...] = ()

    def require_no_experts(self, adapter: Path) -> None:
        """Refuse an original base, of which the adapter alone cannot truncate the experts.

        Raises:
            UsageError: naming the first expert.
        """
        if self.experts:
            raise UsageError(
                f"its base has {len(self.experts)} truncated matrices of experts, such as {self.experts[0]}",
                str(adapter),
                "give the truncated base (base/)",
            )

    def rank(self, name: str, r: int) -> int:
        """Number of components dropped from a weight, for an adapter of rank r on it."""
        return self.ranks.get(name, r)

    def from_tail(self, name: str, module: str, rank: int) -> Term | None:
        """The term -U_d S_d V_d^T of a weight from the tail; None if the tail lacks it, or has another rank."""
        names = peft.tensor_names(module)
        needed = {names["A"], names["B"]}
        if self.tail is None or self.ranks.get(name) != rank or not needed <= self.tail.tensors.keys():
            return None
        A, B = (self.tail.tensor(names[side]).to(torch.float64) for side in "AB")
        return Term(B[:, :rank], A[:rank])  # components beyond the rank are zero padding

    def term(
        self, checkpoint: Checkpoint, facts: Facts, matrix: Matrix, module: str, rank: int
    ) -> Term | None:
        """The term -U_d S_d V_d^T of a weight of the original base; None if nothing is dropped.

        Raises:
            NumericalError: no solver converges.
        """
        if not rank:
            return None
        piece = matrix.pieces[0]
        term = self.from_tail(piece.name, module, rank) if piece.index is None else None
        if term and self.originals.get(piece.name) == hash_tensor(checkpoint, piece.name):
            return term
        weight = weigh(checkpoint, matrix.within(checkpoint.tensors), torch.device("cpu"))
        (term,) = truncation(facts.bench(weight).bottom(rank)).terms
        return term


def known_truncations(adapter: Path, base: Origin | None) -> Truncations:
    """The truncations that an adapter was trained with, from the manifest beside it or beside its base.

    Raises:
        IntegrityError: the tail differs from its hash in the manifest.
    """
    beside_base = [(base.checkpoint.root, base.manifest)] if base else []
    for folder, known in ((adapter, adapter_manifest(adapter)), *beside_base):
        if isinstance(known, TruncateManifest):
            return Truncations(
                {name: truncation.truncation_rank for name, (_, truncation) in known.truncations.items()},
                {name: str(known.tensors[name].input_blake3) for name in known.truncations},
                _tail(folder.parent, known),
                tuple(known.experts),
            )
    return Truncations()


def _tail(output: Path, known: TruncateManifest) -> Container | None:
    """The tail of an output, if it was written and still exists."""
    record, path = known.files.get(TAIL), output / TAIL
    if record is None or not path.is_file():
        return None
    if sha256_file(path) != record.sha256:
        raise IntegrityError(
            "altered: its hash differs from the manifest", str(path), "restore it, or remove the folder"
        )
    return read_header(path)
