"""Benchmarks: ratios from interleaved pairs, and what others pay for the same."""
