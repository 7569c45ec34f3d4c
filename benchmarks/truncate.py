"""How much faster, and in how much less memory, than PEFT is a KaSA start made?

    python benchmarks/truncate.py --width 2048 --layers 8
    python benchmarks/truncate.py --width 4096 --layers 2

About four seconds of either contender are imports, so few layers say little.

Both start from the same files and end with a truncated base and an adapter on disk, in processes of their own,
one after the other. PEFT: `from_pretrained`, `get_peft_model` with `KasaConfig`, `save_pretrained` of both.
The lower bound is the time of the Gram matrices and their Cholesky factors alone, on as many workers as kasa.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from measuring import Usage, gib, llama_shaped, measured, show

RANK = 16


def peft(model: str, out: str) -> None:
    from peft import KasaConfig, LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", kasa_config=KasaConfig())
    wrapped = get_peft_model(loaded, config)
    wrapped.save_pretrained(f"{out}/adapter")
    wrapped.unload().save_pretrained(f"{out}/base")


def bound(model: str, workers: int) -> None:
    """Gram matrices and Cholesky factors of every target, and nothing else."""
    from kasa_cli.linalg import kernels
    from kasa_cli.linalg.frame import frame_of
    from kasa_cli.linalg.gram import gram
    from kasa_cli.pipeline.opening import ModelLocation, survey
    from kasa_cli.pipeline.workers import blas_threads, run

    _, checkpoint, names = survey(ModelLocation(model))
    chosen = [n for n, e in checkpoint.tensors.items() if len(e.shape) == 2 and names.slots[n].in_block]
    chosen.sort(
        key=lambda name: -(min(checkpoint.tensors[name].shape) ** 2) * max(checkpoint.tensors[name].shape)
    )

    def task(name: str) -> None:
        kernels.factorise(gram(frame_of(checkpoint.tensor(name))))

    with blas_threads(1):
        run(task, chosen, workers, lambda name: None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounding", default="nearest")
    parser.add_argument("--without-peft", action="store_true", help="only kasa and the lower bound")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--run", nargs=2, metavar=("WHO", "MODEL"), help=argparse.SUPPRESS)
    parser.add_argument("--out", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        who, model = arguments.run
        peft(model, arguments.out) if who == "peft" else bound(model, arguments.workers)
        return
    figures = compare(arguments)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({name: vars(usage) for name, usage in figures.items()}, indent=1)
        )


def compare(arguments: argparse.Namespace) -> dict[str, Usage]:
    this = [sys.executable, __file__, "--workers", str(arguments.workers)]
    with tempfile.TemporaryDirectory(prefix="kasa-bench-") as place:
        model = str(llama_shaped(Path(place) / "model", arguments.width, arguments.layers))
        size = sum(file.stat().st_size for file in Path(model).iterdir())
        print(f"Llama-shaped, width {arguments.width}, {arguments.layers} layers, bfloat16, {gib(size)}")
        options = [
            "-r",
            str(RANK),
            "--workers",
            str(arguments.workers),
            "--rounding",
            arguments.rounding,
            "--no-store",
            "-q",
        ]
        kasa = [sys.executable, "-m", "kasa_cli", "truncate", model, "-o", f"{place}/kasa", *options]
        figures = {"kasa": measured([*kasa, "--json"])}
        figures["lower bound"] = measured([*this, "--run", "bound", model])
        if not arguments.without_peft:
            shutil.rmtree(f"{place}/kasa")
            figures["PEFT"] = measured(
                [*this, "--run", "peft", model, "--out", f"{place}/peft"], arguments.workers
            )
    show(figures)
    return figures


if __name__ == "__main__":
    main()
