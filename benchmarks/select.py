"""How much faster, and in how much less memory, than PEFT are targets chosen by condition number?

    python benchmarks/select.py --width 4096 --layers 2
    python benchmarks/select.py --width 2048 --layers 8

Both start from the same files, in processes of their own, one after the other, and must choose the same modules.
PEFT: `from_pretrained`, then `peft.helpers.find_kappa_target_modules`. The second question is another share of the
same model (kasa reads and hashes), and the third asks for the whole spectrum of each weight.
About four seconds of either contender are imports, so few layers say little.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path


def step_aside() -> None:
    """Whoever imports `select` from a script of this folder means the standard library's."""
    here = Path(__file__).parent
    spec = PathFinder.find_spec("select", [place for place in sys.path if Path(place).absolute() != here])
    if spec is None or spec.loader is None:
        raise ImportError("no module named select in the standard library")
    sys.modules["select"] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules["select"])


if __name__ == "__main__":
    from selection import main

    main(__doc__)
else:
    step_aside()
