"""kasa: spectral surgery on Hugging Face checkpoints, one tensor at a time.

Each verb of the command line is a function here. Nothing heavy is imported before one of them is used.

>>> import kasa_cli as kasa
>>> kasa.function_name("inspect diff")
'inspect_diff'
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kasa_cli.commands.convert import convert as convert
    from kasa_cli.commands.demo import demo as demo
    from kasa_cli.commands.files import spectrum_page as spectrum_page
    from kasa_cli.commands.files import to_json as to_json
    from kasa_cli.commands.inspect_adapter import inspect_adapter as inspect_adapter
    from kasa_cli.commands.inspect_diff import inspect_diff as inspect_diff
    from kasa_cli.commands.inspect_spectrum import inspect_spectrum as inspect_spectrum
    from kasa_cli.commands.merge import merge as merge
    from kasa_cli.commands.select_targets import select_targets as select_targets
    from kasa_cli.commands.store_ls import store_ls as store_ls
    from kasa_cli.commands.store_prune import store_prune as store_prune
    from kasa_cli.commands.truncate import truncate as truncate
    from kasa_cli.commands.verify import verify as verify
    from kasa_cli.errors import *  # noqa: F403
    from kasa_cli.report import *  # noqa: F403

__version__ = "0.1.0"

VERBS = (
    "truncate",
    "inspect spectrum",
    "inspect adapter",
    "inspect diff",
    "select-targets",
    "merge",
    "convert",
    "verify",
    "store ls",
    "store prune",
    "demo",
)
"""Every verb, in the order of the help. `commands/inspect_diff.py` has the function of `inspect diff`, and
`cli/inspect_diff.py` its flags."""


def function_name(verb: str) -> str:
    """The name of the function of a verb.

    >>> function_name("select-targets")
    'select_targets'
    """
    return verb.replace(" ", "_").replace("-", "_")


FUNCTIONS = {
    **{name: name for name in map(function_name, VERBS)},
    "to_json": "files",
    "spectrum_page": "files",
}
"""The module of each function, in `commands`. Errors and reports are exported beside them."""


def __getattr__(name: str) -> Any:
    if name in FUNCTIONS:
        return getattr(import_module(f"kasa_cli.commands.{FUNCTIONS[name]}"), name)
    if not name.startswith("_"):
        for module in ("kasa_cli.errors", "kasa_cli.report"):
            if name in (home := import_module(module)).__all__:
                return getattr(home, name)
    if name == "__all__":
        return _exported()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({"__version__", *_exported()})


def _exported() -> list[str]:
    """The names of the public interface."""
    homes = [import_module(module) for module in ("kasa_cli.errors", "kasa_cli.report")]
    return sorted({*FUNCTIONS, *(name for home in homes for name in home.__all__)})
