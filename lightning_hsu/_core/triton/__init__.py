"""Compiled twins of the hot loops, in Triton; imported only where the back end "triton" is asked for."""
