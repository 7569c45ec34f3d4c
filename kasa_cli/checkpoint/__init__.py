"""The bytes: what checkpoints and adapters look like on disk."""

from kasa_cli.checkpoint import manifest, model_card, model_config
from kasa_cli.checkpoint.dtypes import BITS, DTYPES, FLOATS, TORCH_DTYPES
from kasa_cli.checkpoint.folder import require_inside
from kasa_cli.checkpoint.hashing import blake3, digest_of, hash_tensor
from kasa_cli.checkpoint.layout import Checkpoint, open_checkpoint
from kasa_cli.checkpoint.manifest import (
    ConvertedAdapter,
    ConvertManifest,
    ConvertOptions,
    Environment,
    ExpertRecord,
    FactorRecord,
    FileRecord,
    InputTensor,
    Manifest,
    Merged,
    MergedAdapter,
    MergeManifest,
    MergeOptions,
    SourceRecord,
    StoredTensor,
    TensorRecord,
    TruncateManifest,
    TruncateOptions,
    TruncationRecord,
    fingerprint,
    numeric_environment,
)
from kasa_cli.checkpoint.matrix import (
    Matrix,
    Orientation,
    Piece,
    decomposition_work,
    measuring_bytes,
    read_piece,
)
from kasa_cli.checkpoint.model_config import refuse_quantised
from kasa_cli.checkpoint.open_files import OpenFiles
from kasa_cli.checkpoint.safetensors_file import Container, Reader, TensorEntry, read_header
from kasa_cli.checkpoint.safetensors_writer import Filling, filling, lay_out, raw_bytes
from kasa_cli.checkpoint.shard_plan import CARD, Sheet, base_sheets, copy_companions, write_index
from kasa_cli.checkpoint.source import Source, resolve
from kasa_cli.checkpoint.tensor_source import TensorSource

__all__ = [
    "BITS",
    "CARD",
    "DTYPES",
    "FLOATS",
    "TORCH_DTYPES",
    "Checkpoint",
    "Container",
    "ConvertManifest",
    "ConvertOptions",
    "ConvertedAdapter",
    "Environment",
    "ExpertRecord",
    "FactorRecord",
    "FileRecord",
    "Filling",
    "InputTensor",
    "Manifest",
    "Matrix",
    "MergeManifest",
    "MergeOptions",
    "Merged",
    "MergedAdapter",
    "OpenFiles",
    "Orientation",
    "Piece",
    "Reader",
    "Sheet",
    "Source",
    "SourceRecord",
    "StoredTensor",
    "TensorEntry",
    "TensorRecord",
    "TensorSource",
    "TruncateManifest",
    "TruncateOptions",
    "TruncationRecord",
    "base_sheets",
    "blake3",
    "copy_companions",
    "decomposition_work",
    "digest_of",
    "filling",
    "fingerprint",
    "hash_tensor",
    "lay_out",
    "manifest",
    "measuring_bytes",
    "model_card",
    "model_config",
    "numeric_environment",
    "open_checkpoint",
    "raw_bytes",
    "read_header",
    "read_piece",
    "refuse_quantised",
    "require_inside",
    "resolve",
    "write_index",
]
