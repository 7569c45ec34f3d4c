"""`python -m kasa_cli` is `kasa`."""

from kasa_cli.cli.app import main

main()
