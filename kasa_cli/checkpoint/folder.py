"""Lists a model folder and decides which of its files belong to the model.

Everything that is not a weight goes along: tokenizers, templates, custom code, the modules of
sentence-transformers with their own small safetensors. Left out are the same weights in other formats, which
some loaders prefer and which would be stale beside the new ones, and what only a training run needs.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from kasa_cli.errors import InvalidInput, UnsafeInput
from kasa_cli.files import quote, refuse_unreadable

MAX_DEPTH = 4  # directories below the root
MAX_FILES = 10_000

PICKLE = "pickle"
FORMATS = {  # weights kasa does not read, by the pattern of their name
    **dict.fromkeys(
        ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib", "*.bin.index.json"), PICKLE
    ),
    **dict.fromkeys(("*.distcp", ".metadata"), "PyTorch distributed checkpoint (pickle)"),
    **dict.fromkeys(("*.tar", "*.tar.gz", "*.nemo"), "tar archive"),
    **dict.fromkeys(("*.gguf", "*.ggml", "ggml-*"), "GGUF"),
    **dict.fromkeys(("*.h5", "*.h5.index.json", "tf_model*", "*.tflite"), "TensorFlow"),
    **dict.fromkeys(("*.msgpack", "*.msgpack.index.json", "flax_model*"), "Flax"),
    **dict.fromkeys(("*.onnx", "*.onnx_data", "*.onnx.*"), "ONNX"),
    **dict.fromkeys(("*.ot",), "Rust libtorch"),
    **dict.fromkeys(("weights*.npz", "model*.npz"), "NumPy archive"),
    **dict.fromkeys(("consolidated*.safetensors", "consolidated*.index.json"), "Mistral's own layout"),
}
OTHER_FORMAT_DIRECTORIES = ("onnx", "openvino", "original", "coreml", "*.mlpackage")

TRAINING = ("training_args.bin", "optimizer.*", "scheduler.pt", "rng_state*", "scaler.pt")
LEFT_DIRECTORIES = {
    **dict.fromkeys(OTHER_FORMAT_DIRECTORIES, "the weights in another format"),
    **dict.fromkeys(("checkpoint-*", "global_step*", "runs"), "left by training"),
    **dict.fromkeys(("__pycache__", "*.kasa-partial", "*.kasa-old-*"), "a working directory"),
    ".*": "hidden",
}
LEFT_FILES = {
    **dict.fromkeys((*TRAINING, "trainer_state.json", "events.out.tfevents*"), "left by training"),
    **{pattern: f"weights in another format ({name})" for pattern, name in FORMATS.items()},
    "kasa.manifest.json": "speaks of another output",
    ".*": "hidden",
}
LEFT_AT_TOP = {  # deeper down, an adapter is a part of the model that its code loads
    "adapter_*": "an adapter, which transformers would apply to the model",
}


@dataclass(frozen=True)
class LeftOut:
    """A file, or a directory, that is not copied."""

    name: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """The files below a root, by relative POSIX path, and the directories that were not entered."""

    files: tuple[str, ...]
    not_entered: tuple[LeftOut, ...]

    @property
    def top(self) -> tuple[str, ...]:
        """The files that lie in the root itself."""
        return tuple(name for name in self.files if "/" not in name)


def list_folder(root: Path) -> Listing:
    """Every file below `root`, sorted. Directories that do not belong to the model are not entered."""
    files: list[str] = []
    not_entered: list[LeftOut] = []
    pending = [""]
    while pending:
        directory = pending.pop()
        for entry in entries_of(root / directory):
            name = f"{directory}{entry.name}"
            if not is_directory(entry):
                files.append(name)
            elif reason := reason_not_to_enter(entry):
                not_entered.append(LeftOut(name, reason))
            else:
                pending.append(f"{name}/")
            check_extent(root, name, len(files) + len(pending) + len(not_entered))
    return Listing(tuple(sorted(files)), tuple(sorted(not_entered, key=lambda left: left.name)))


def entries_of(directory: Path) -> Iterator[os.DirEntry[str]]:
    """The entries of one directory; refused if a name is not printable."""
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if not entry.name.isprintable():
                    raise UnsafeInput(f"file name {quote(entry.name)} is not printable", str(directory))
                yield entry
    except OSError as error:
        refuse_unreadable(directory, error)


def is_directory(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a directory or a link to one. A link in a loop is neither."""
    with suppress(OSError):
        return entry.is_dir()
    return False


def reason_not_to_enter(entry: os.DirEntry[str]) -> str | None:
    """The reason why a directory is not entered; None if it is."""
    return match(entry.name, LEFT_DIRECTORIES) or ("a link to a directory" if entry.is_symlink() else None)


def check_extent(root: Path, name: str, num_seen: int) -> None:
    """A model folder is small and flat; anything else is the wrong folder."""
    if name.count("/") > MAX_DEPTH:
        raise InvalidInput(f"nested more than {MAX_DEPTH} deep", f"{root}/{name}", "is this a model folder?")
    if num_seen > MAX_FILES:
        raise InvalidInput(f"more than {MAX_FILES} files", str(root), "is this a model folder?")


def match(name: str, table: dict[str, str]) -> str | None:
    """The value of the first pattern that fits a name."""
    return next((value for pattern, value in table.items() if fnmatchcase(name, pattern)), None)


def reason_to_leave(name: str) -> str | None:
    """The reason why a file is not copied, from its relative path; None if it is copied.

    >>> reason_to_leave("pytorch_model.bin")
    'weights in another format (pickle)'
    >>> reason_to_leave("2_Dense/model.safetensors")
    """
    reason = match(PurePosixPath(name).name, LEFT_FILES)
    return reason or (None if "/" in name else match(name, LEFT_AT_TOP))


def foreign_weights(names: Iterable[str], where: str) -> UnsafeInput | None:
    """The error for a folder that holds weights in other formats only. No file is opened."""
    weights = [name for name in sorted(names) if not any(fnmatchcase(name, pattern) for pattern in TRAINING)]
    formats = {name: kind for name in weights if (kind := match(name, {**FORMATS, "*.npz": "NumPy archive"}))}
    if not formats:
        return None
    problem = f"only {' and '.join(sorted(set(formats.values())))} weights ({next(iter(formats))})"
    return UnsafeInput(problem, where, "convert them to safetensors first")


def require_inside(root: Path, name: str, hub_cache: Path | None) -> None:
    """Refuse a link that leads out of the folder, or of the Hub cache when kasa itself looked there."""
    path = root / name
    if not path.is_symlink():
        return
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop, before Python 3.13
        raise InvalidInput("a broken link", str(path)) from error
    allowed = [root.resolve(), *([hub_cache.resolve()] if hub_cache else [])]
    if not any(target.is_relative_to(home) for home in allowed):
        remedy = "copy the file here, or name a cached model by its Hub id"
        raise UnsafeInput("a link that leads out of the folder", str(path), remedy)
