"""Truncated base, fresh adapter and tail."""
