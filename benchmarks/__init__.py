"""What the library costs: ``make bench``, or ``make bench QUICK=--quick`` to see that it runs."""
