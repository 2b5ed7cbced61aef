"""Compiled versions of the hot loops, in Triton; imported only for the back end "triton"."""
