"""Checks of an output: files against the manifest, tensors against their base."""
