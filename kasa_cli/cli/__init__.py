"""The command line: the only package that talks to a terminal."""

from kasa_cli.cli.app import main

__all__ = ["main"]
