"""`python -m kasa_cli` is `kasa`."""

from kasa_cli.cli import main

main()
