"""Filao in frameworks; each package here is imported only by programs that have the framework installed."""
