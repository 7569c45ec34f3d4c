"""Opens the model that the user named: its checkpoint, with every header checked, and the names of its modules."""

from dataclasses import dataclass
from pathlib import Path

from kasa_cli.checkpoint import Checkpoint, Source, open_checkpoint, refuse_quantised, resolve
from kasa_cli.files import Store
from kasa_cli.model_names import NameMap, names_of


@dataclass(frozen=True)
class ModelLocation:
    """Location of a model: a directory, or a Hub id with its revision."""

    model: str
    revision: str | None = None
    cache_dir: Path | None = None
    local_files_only: bool = False


def survey(where: ModelLocation, store: Store | None = None) -> tuple[Source, Checkpoint, NameMap]:
    """A model: its files, with every header checked, and the modules of its tensors.

    The names come from `store` if it has them, and are kept there. Without a store nothing is written.
    """
    source, checkpoint = find(where)
    refuse_quantised(checkpoint.config, checkpoint.tensors, where.model)
    shapes = {name: entry.shape for name, entry in checkpoint.tensors.items()}
    return source, checkpoint, names_of(checkpoint.config, shapes, store)


def find(where: ModelLocation) -> tuple[Source, Checkpoint]:
    """The files of a model, with every header checked."""
    source = resolve(
        where.model,
        revision=where.revision,
        cache_dir=where.cache_dir,
        local_files_only=where.local_files_only,
    )
    return source, open_checkpoint(source.root, hub_cache=source.hub_cache)
