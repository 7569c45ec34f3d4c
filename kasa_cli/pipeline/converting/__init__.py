"""An adapter as the factors of a plain LoRA."""
