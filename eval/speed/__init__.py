"""Benchmarks of training and decoding: each prints JSON lines."""
