"""A base with adapters added to it, each tensor rounded once."""
