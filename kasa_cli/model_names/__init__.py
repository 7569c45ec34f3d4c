"""Names of tensors on disk and of modules in memory, by transformers."""
