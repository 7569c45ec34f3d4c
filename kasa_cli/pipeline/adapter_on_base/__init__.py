"""An adapter matched with its base: which tensors it changes, and whether the base is the right one."""
