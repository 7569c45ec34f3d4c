"""Spectral facts of weights, from the store or by one decomposition."""
