"""The maths: tensors in, tensors out; no file, no name, no terminal."""
