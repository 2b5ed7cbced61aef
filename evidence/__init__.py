"""Does the penalty help, and where: many small networks on real data, by a protocol fixed before its results."""
