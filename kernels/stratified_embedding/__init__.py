"""The gradients of lookups in an item table, summed by (stratum, item)."""

from .op import cost, stratified_embedding_add, stratified_embedding_reduce

__all__ = ["cost", "stratified_embedding_add", "stratified_embedding_reduce"]
