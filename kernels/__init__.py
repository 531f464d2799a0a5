"""Ops of pinet_fast, imported as ``pinet_fast.kernels``.

Importing this loads no Triton, no compiled library and no driver; the first call of an op does.
"""

from ._registry import backend_status, describe_status, explain
from .dropout_mask import dropout_mask
from .ragged_attention import ragged_attention
from .routed_linear import routed_linear
from .stratified_embedding import stratified_embedding_add, stratified_embedding_reduce
from .stratified_linear import stratified_linear_backward
from .stratified_norm import stratified_norm_backward
from .stratum_combine import stratum_combine
from .stratum_gram import stratum_gram
from .stratum_solve import stratum_solve
from .stratum_sums import stratum_sums

__all__ = [
    "backend_status",
    "describe_status",
    "dropout_mask",
    "explain",
    "ragged_attention",
    "routed_linear",
    "stratified_embedding_add",
    "stratified_embedding_reduce",
    "stratified_linear_backward",
    "stratified_norm_backward",
    "stratum_combine",
    "stratum_gram",
    "stratum_solve",
    "stratum_sums",
]
