"""Results that may differ by float32's rounding, as where another CPU adds in another order."""

import torch


def assert_near(found, expected, of_largest=3e-5):
    """Each entry is as expected, up to a fraction of the largest one that is expected.

    Small entries of a gradient are what is left of larger ones that cancel, and round as those do:
    no limit relative to themselves holds for every order of a sum.

    Args:
        found: A tensor.
        expected: What it should be, of its dtype.
        of_largest: The fraction. Measured: up to 1e-5 where two of few neurons are near (sixteen in
            eight dimensions, on a CPU without vector instructions), else 1e-6.
    """
    largest = float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, rtol=0.0, atol=of_largest * largest)
