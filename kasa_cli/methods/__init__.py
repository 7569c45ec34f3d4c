"""The choices: tables of pure functions."""
