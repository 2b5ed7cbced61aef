"""Does the penalty help, and where: small networks on real data, by a protocol fixed beforehand."""
