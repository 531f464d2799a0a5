"""Checks and times every kernel on a GPU, straight from a checkout; ``python -m`` runs it.

Needs torch and Triton alone: no installation, no network, none of the library's other packages.
"""
