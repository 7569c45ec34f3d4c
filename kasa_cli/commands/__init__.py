"""One function a verb, with plain arguments: `kasa_cli` exports them, and the command line calls them."""
