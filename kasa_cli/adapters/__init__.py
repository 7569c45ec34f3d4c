"""Adapter files: read, check, place on a base, write."""
