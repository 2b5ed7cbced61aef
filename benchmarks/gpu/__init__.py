"""The penalty on a GPU: is it right there, and what does it cost (`python -m benchmarks.gpu -h`)."""
