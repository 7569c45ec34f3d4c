"""Adapter kinds: one row each."""
