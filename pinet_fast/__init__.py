"""Deconfounded training of sequential recommenders: one backward, S exact stratum gradients."""

from __future__ import annotations

from pathlib import Path

__version__ = "0.1.0"


def _find_kernels_of_a_checkout() -> None:
    """Let a bare checkout import ``pinet_fast.kernels``, which lies beside this package there."""
    here = Path(__file__).resolve().parent
    if not (here / "kernels").is_dir() and (here.parent / "kernels" / "__init__.py").is_file():
        __path__.append(str(here.parent))


_find_kernels_of_a_checkout()
