"""Plugin heads: what each stratum adds to the shared backbone."""

from __future__ import annotations

from pinet_fast.heads.plugin import PluginHeads

__all__ = ["PluginHeads"]
