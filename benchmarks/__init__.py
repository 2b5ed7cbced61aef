"""What the library costs, measured: ``make bench``, or ``make bench QUICK=--quick`` to see that it runs."""
