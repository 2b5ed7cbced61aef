"""Twins of the hot loops as Triton kernels. Nothing here is imported before a tensor is known to go through them."""
