"""The only place where bytes and maths meet, and the only loops over tensors."""
