"""The options of `truncate`, their checks, and the record of the options that determine the bytes of the output."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from kasa_cli.checkpoint import DTYPES, TruncateOptions
from kasa_cli.errors import UsageError
from kasa_cli.linalg import ROUNDINGS
from kasa_cli.methods import kasa
from kasa_cli.pipeline.workers import RunOptions, check_running
from kasa_cli.targets import Patterns

PARTS = ("base", "adapter", "tail")
SHARD_SIZE = re.compile(r"(?=.*[1-9])\d+(\.\d+)?\s?[KMGT]B", re.IGNORECASE)


@dataclass(frozen=True)
class TruncateRequest:
    """The options of `kasa truncate`, except those that locate the model.

    `truncation_rank` None is the rank, `alpha` None twice the rank, `workers` 0 the number of cores.
    """

    rank: int = 16
    truncation_rank: int | None = None
    alpha: float | None = None
    use_rslora: bool = False
    emit: tuple[str, ...] = PARTS
    dtype: str = "auto"
    rounding: str = "nearest"
    min_realised: float = 0.9
    diag_init: str = "randn"
    beta: float = 1e-4
    gamma: float = 1e-3
    compat: str = "peft"
    max_shard_size: str | None = None
    patterns: Patterns = field(default_factory=Patterns)
    targets_from: Path | None = None
    seed: int = 0
    workers: int = 0
    threads_per_worker: int = 1
    device: str = "auto"
    store: Path | None = None
    use_store: bool = True
    overwrite: bool = False
    restart: bool = False

    @property
    def running(self) -> RunOptions:
        """Workers, threads, device and store."""
        return RunOptions(self.workers, self.threads_per_worker, self.device, self.store, self.use_store)

    @property
    def dropped(self) -> int:
        """The truncation rank, T."""
        return self.rank if self.truncation_rank is None else self.truncation_rank

    @property
    def lora_alpha(self) -> float:
        """The alpha of the adapter."""
        return 2 * self.rank if self.alpha is None else self.alpha

    @property
    def num_workers(self) -> int:
        """Number of matrices processed at once."""
        return self.running.num_workers


def check(options: TruncateRequest) -> None:
    """Refuse options that no model can satisfy.

    Raises:
        UsageError: naming the option and its valid values.
    """
    if {type(options.rank), type(options.dropped)} != {int} or options.rank < 1 or options.dropped < 0:
        raise UsageError(
            f"invalid ranks {options.rank!r} and {options.dropped!r}",
            "",
            "a rank is a positive whole number, a truncation rank 0 or more",
        )
    if not options.emit:
        raise UsageError("no part is selected for output", "", f"give some of {', '.join(PARTS)}")
    if not (0 <= options.beta < math.inf and 0 <= options.gamma < math.inf):
        raise UsageError(
            f"invalid loss weights {options.beta} and {options.gamma}: both are finite and not negative"
        )
    if not 0 <= options.min_realised <= 1:
        raise UsageError(f"min_realised {options.min_realised} is not a share", "", "give 0 to 1")
    check_running(options.running)
    if not 0 < options.lora_alpha < math.inf:
        raise UsageError(f"invalid alpha {options.lora_alpha}: it is positive and finite")
    if options.max_shard_size is not None and not SHARD_SIZE.fullmatch(options.max_shard_size):
        raise UsageError(
            f"invalid shard size {options.max_shard_size!r}", "", "give a number and a unit, such as 5GB"
        )
    _check_names(options)


def recorded(options: TruncateRequest) -> TruncateOptions:
    """The options on which the bytes of the output depend."""
    return TruncateOptions(
        alpha=options.lora_alpha,
        beta=options.beta,
        compat=options.compat,
        diag_init=options.diag_init,
        dtype=options.dtype,
        emit=tuple(sorted(options.emit)),
        gamma=options.gamma,
        max_shard_size=options.max_shard_size,
        rank=options.rank,
        rounding=options.rounding,
        seed=options.seed,
        truncation_rank=options.dropped,
        use_rslora=options.use_rslora,
    )


def _check_names(options: TruncateRequest) -> None:
    for values, known, label in (
        (options.emit, PARTS, "part to emit"),
        ((options.dtype,), DTYPES, "dtype"),
        ((options.rounding,), ROUNDINGS, "rounding"),
        ((options.diag_init,), kasa.DIAG_INITS, "diag init"),
        ((options.compat,), kasa.COMPATS, "compat"),
    ):
        for name in values:
            if name not in known:
                raise UsageError(f"unknown {label} {name!r}", "", f"known: {', '.join(known)}")
    if options.diag_init == "residual" and options.dropped < options.rank:
        raise UsageError(
            "the residual init needs as many dropped components as the rank",
            "",
            "raise --truncation-rank or lower --rank",
        )
