"""The errors of a command that refuses its input."""

from pathlib import Path
from typing import Any

import pytest

from kasa_cli.errors import IntegrityError
from kasa_cli.pipeline.verifying.run import verify


def refusal(output: Path, **depth: Any) -> str:
    """The error of `kasa verify`."""
    with pytest.raises(IntegrityError) as caught:
        verify(output, **depth)
    return str(caught.value)
