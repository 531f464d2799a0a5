"""The leak check: proof that the loss of a stratum reaches no other stratum's gradient.

If rows are attributed rightly, the loss of stratum s sends exactly zero to the slices of the other
strata in every virtual leaf. Two backwards per bit of the stratum id, each from the losses of the
strata whose bit is 0 or 1 with random positive factors, test every ordered pair (s, t). A pair is
proven at a call site only when the own slice of s received a non-zero finite gradient: a
zero-initialised layer above hides every leak, so until then the site stays armed.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pinet_fast.aggregation.coverage import Coverage, CoverageEntry, backend_of
from pinet_fast.errors import ConfigError, StratumLeakError

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger("pinet_fast.aggregation")

CheckMode = Literal["first", "never", "always"]

_PATIENCE = 8
"""Attempts after which an unproven site is tried at steps 16, 32, 64 ... only.

Parts of a model can stay without gradient for good (a dead unit, an unused table); without this
they would cost extra backwards at every step. The coverage says that they are unproven."""


class Site(NamedTuple):
    """Where a parameter meets rows: what the proof is about."""

    parameter: tuple[int, ...]
    op: str
    kind: str
    dim: int
    occurrence: int
    is_sliced: bool = False


@dataclass
class Use:
    """One use of a virtual leaf in this step that still needs proof."""

    site: Site
    leaf: Tensor


class _Proof:
    def __init__(self, num_strata: int) -> None:
        self.pairs = torch.eye(num_strata, dtype=torch.bool)
        self.attempts = 0
        self.step: int | None = None

    @property
    def complete(self) -> bool:
        return bool(self.pairs.all())


class LeakCheck:
    """Keeps what is proven and runs the check where proof is missing.

    Args:
        mode: ``"first"`` checks a site until it is proven, ``"always"`` at every step,
            ``"never"`` not at all.

    Attributes:
        settled: Sites that :meth:`wants` no check of, as plain tuples, which are quicker to make.
    """

    def __init__(self, mode: CheckMode) -> None:
        if mode not in get_args(CheckMode):
            raise ConfigError(f'check: expected "first", "never" or "always", got {mode!r}')
        self.mode: CheckMode = mode
        self._proofs: dict[Site, _Proof] = {}
        self.settled: set[tuple[object, ...]] = set()
        self._roles: dict[tuple[tuple[int, ...], str], set[tuple[str, int]]] = {}
        self._accepted: set[Site] = set()
        # Of its own: a check must not move the stream that dropout draws from.
        self._generator = torch.Generator().manual_seed(0)

    def forget(self) -> None:
        """Forget all proofs: positions count other parameters than before."""
        self._proofs.clear()
        self.settled.clear()
        self._roles.clear()
        self._accepted.clear()

    def wants(self, site: Site, num_strata: int) -> bool:
        """Return whether this step's use of ``site`` needs a check."""
        if self.mode != "first":
            return self.mode == "always"
        proof = self._proofs.get(site)
        if proof is not None and proof.step is not None:
            return False
        if proof is None:
            proof = self._proofs[site] = _Proof(num_strata)
        proof.attempts += 1
        return proof.attempts <= _PATIENCE or (proof.attempts & (proof.attempts - 1)) == 0

    def run(
        self, uses: Sequence[Use], losses: Tensor, present: Sequence[bool], step: int,
        names: Sequence[str], *, accept: bool = False,
    ) -> bool:  # fmt: skip
        """Check the uses of this step; keeps the graph for the backward that follows.

        Args:
            uses: Uses that need proof.
            losses: Stratum losses, [S], with their graph.
            present: Which strata have rows in this batch.
            step: The step, noted at sites proven now.
            names: Names of the parameters, for messages.
            accept: Whether leaks are only reported.

        Returns:
            Whether there was a leak; such sites stay unproven.

        Raises:
            StratumLeakError: A stratum's loss reaches another stratum's slice.
        """
        if not bool(losses.detach()[list(present)].isfinite().all()):
            return False  # an overflow (a loss scale too large, say) proves nothing: stay armed
        here = torch.tensor(list(present))
        has_leak = False
        for members in _subsets(here):
            factors = torch.rand(len(present), generator=self._generator) + 0.5
            cotangent = (factors * members).to(losses)
            leaves = [use.leaf for use in uses]
            grads = torch.autograd.grad(
                losses, leaves, cotangent, retain_graph=True, allow_unused=True
            )
            for use, grad in zip(uses, grads, strict=True):
                if grad is not None:
                    sizes = _slice_sizes(grad)
                    try:
                        self._judge(use.site, sizes, members, here, names)
                    except StratumLeakError as leak:
                        if not accept:
                            raise
                        has_leak = True
                        if use.site not in self._accepted:
                            self._accepted.add(use.site)
                            logger.warning("attributed by row: %s", leak)
        for use in uses:
            proof = self._proofs.get(use.site)
            if proof is not None and proof.complete and proof.step is None:
                proof.step = step
                if self.mode == "first":
                    self.settled.add(tuple(use.site))
                role = (use.site.kind, use.site.dim)
                self._roles.setdefault((use.site.parameter, use.site.op), set()).add(role)
        return has_leak

    def _judge(
        self, site: Site, sizes: Tensor, members: Tensor, here: Tensor, names: Sequence[str]
    ) -> None:
        if not bool(sizes[members].isfinite().all()):
            return  # overflow in the own slices spills NaN (0 * inf) into all: inconclusive
        leaked = ~members & ~(sizes == 0)  # NaN beside finite own slices counts as a leak
        if bool(leaked.any()):
            stratum = int(leaked.nonzero()[0])
            own = float(sizes[members].sum())
            raise StratumLeakError(_leak_message(site, stratum, float(sizes[stratum]), own, names))
        proof = self._proofs.setdefault(site, _Proof(len(members)))
        own_moves = members & (sizes > 0)
        proof.pairs |= own_moves.unsqueeze(1) & (here & ~members).unsqueeze(0)

    @property
    def is_armed(self) -> bool:
        """Return whether something is left to prove."""
        return self.mode == "always" or self.has_unproven

    @property
    def has_unproven(self) -> bool:
        """Return whether a site that was seen is not proven yet."""
        if self.mode == "first":  # every step asks
            return len(self.settled) < len(self._proofs)
        return None in [proof.step for proof in self._proofs.values()]

    def proven_role(self, parameter: tuple[int, ...], op: str) -> tuple[str, int] | None:
        """Return the kind of rows and their dimension that is proven for all uses, or None."""
        roles = self._roles.get((parameter, op), set())
        return next(iter(roles)) if len(roles) == 1 else None

    def coverage(self) -> list[tuple[Site, int | None]]:
        """Return every site seen and the step at which it was proven (None = not yet)."""
        return [(site, proof.step) for site, proof in self._proofs.items()]

    def coverage_of(self, names: Sequence[str]) -> Coverage:
        """Return the sites as entries that people read."""
        return Coverage(
            CoverageEntry(
                "+".join(names[i] for i in site.parameter), site.op,
                "slice" if site.is_sliced else "boundary", site.kind, site.dim,
                site.occurrence + 1, step, backend_of(site.op, is_sliced=site.is_sliced),
            )
            for site, step in self.coverage()
        )  # fmt: skip


def _subsets(here: Tensor) -> list[Tensor]:
    """Return masks over the present strata: those whose id has a given bit set, and not set."""
    ids = torch.arange(len(here))
    masks = []
    for bit in range((len(here) - 1).bit_length()):
        for value in (0, 1):
            mask = ((ids >> bit) & 1).eq(value) & here
            if bool(mask.any()):
                masks.append(mask)
    return masks


def _slice_sizes(grad: Tensor) -> Tensor:
    """Return the sum of magnitudes in each stratum's slice of a leaf's gradient: [S], on host."""
    values = (grad._values() if grad.is_sparse else grad).abs()
    per_row = (values.flatten(1).sum(1) if values.dim() > 1 else values).double()
    if not grad.is_sparse:
        return per_row.cpu()
    sizes = per_row.new_zeros(grad.shape[0]).index_add_(0, grad._indices()[0], per_row)
    return sizes.cpu()


def _leak_message(site: Site, stratum: int, leak: float, own: float, names: Sequence[str]) -> str:
    name = ", ".join(names[i] for i in site.parameter)
    share = f"{leak / own:.2g} of its own gradient" if own > 0 else f"{leak:.2g}"
    return (
        f"stratum leak: at {site.op} with {name}, rows taken as {site.kind} in dimension "
        f"{site.dim}, the loss of other strata reaches the gradient of stratum {stratum} "
        f"({share}). The model mixes users across rows (in-batch negatives, batch statistics), or "
        "another dimension holds the rows. Give the ragged layout by stratify(strata, "
        "lengths=...) or rows=..., mark work whose rows belong to no user by `with opt.shared():`, "
        'accept it by GradientAggregator(..., leaks="attribute-by-row"), or pay for S backwards '
        'with GradientAggregator(..., mode="exact")'
    )
