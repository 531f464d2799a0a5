"""Boundary rules of products of rows and a parameter: ``einsum``, ``bmm`` and ``bilinear``."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pinet_fast.aggregation.boundary import apply
from pinet_fast.aggregation.products import Letters, StratifiedBilinear, StratifiedContraction
from pinet_fast.aggregation.rule_arguments import Args, Func, Kwargs, bind, detached
from pinet_fast.aggregation.slice_rule import slice_rule

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pinet_fast.aggregation.interception import BoundaryRule, Interception


def _einsum(mode: Interception, func: Func, args: Args, kwargs: Kwargs) -> Any:
    """Two tensors of which one is a parameter; any other call is sliced."""
    out = None
    operands = args[1:]
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if isinstance(args[0], str) and len(operands) == 2:
        equation = args[0]
        terms = _terms(equation, [t.dim() for t in operands])
        if terms is not None:
            run = lambda a, b: torch.einsum(equation, a, b)  # noqa: E731
            out = _contracted(mode, "einsum", run, operands, terms)
    return slice_rule(mode, func, args, kwargs) if out is None else out


def _terms(equation: str, ranks: Sequence[int]) -> tuple[str, str, str] | None:
    """Return the letters of both operands and of the result; None for what is not spelled out.

    An ellipsis in one operand and in the result is spelled out here.
    """
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    terms = [*inputs.split(","), out]
    if not arrow or len(terms) != 3:
        return None
    for i, rank in enumerate(ranks):
        if "..." in terms[i]:
            unused = [c for c in string.ascii_letters if c not in equation]
            spelled = "".join(unused[: max(rank - len(terms[i]) + 3, 0)])
            terms[i], terms[2] = (terms[k].replace("...", spelled) for k in (i, 2))
            break
    left, right, out = terms
    return None if "." in left + right + out else (left, right, out)


def _bmm_arguments(input: Any, mat2: Any) -> Args:
    return input, mat2


def _bmm(mode: Interception, func: Func, args: Args, kwargs: Kwargs) -> Any:
    """A parameter with a matrix a head; one expanded over users is sliced with them."""
    operands = bind(_bmm_arguments, args, kwargs)
    out = None
    if all(t.dim() == 3 for t in operands):
        out = _contracted(mode, "bmm", torch.bmm, operands, ("bij", "bjk", "bik"))
    return slice_rule(mode, func, args, kwargs) if out is None else out


def _contracted(
    mode: Interception,
    op: str,
    run: Callable[[Tensor, Tensor], Tensor],
    operands: Sequence[Tensor],
    terms: tuple[str, str, str],
) -> Tensor | None:
    """Return the product of rows and a parameter; None where the rule does not cover it."""
    roots = [mode.root_of(t) for t in operands]
    place = 0 if roots[0] is not None else 1  # of the parameter
    root, rows = roots[place], operands[1 - place]
    if root is None or roots[1 - place] is not None:
        return None
    letters = Letters(terms[1 - place], terms[place], terms[2])
    if not _is_plain(letters, rows, root.tensor):
        return None
    are_complex = {rows.is_complex(), root.tensor.is_complex()}
    if len(are_complex) > 1 or (True in are_complex and not letters.batched):
        return None  # a linear layer's kernels take real numbers
    # Where the parameter has values of its own there are no rows; it may be expanded over them.
    own = {c for c, stride in zip(letters.weight, root.tensor.stride(), strict=True) if stride != 0}
    sizes = tuple(
        -1 if c in own else size for c, size in zip(letters.rows, rows.shape, strict=True)
    )
    layout = mode.find(sizes, rows, (root,), op)
    if layout is None:
        return None
    letter = letters.rows[layout.dim]
    if letter in letters.weight or letter not in letters.out:
        return None
    if letters.batched:
        groups = mode.rows.groups_along(layout)
        op = op if op == "bmm" else f"{op} (batched)"
    else:
        kept = tuple(rows.shape[letters.rows.index(c)] for c in letters.kept)
        groups = mode.rows.groups_of(layout._replace(dim=letters.kept.index(letter)), kept)
    leaf = mode.dense_leaf(root, op, layout)
    ordered = run if place == 1 else lambda a, b: run(b, a)
    out: Tensor = apply(
        StratifiedContraction, rows, root.detached(), leaf, ordered, letters, layout.dim, groups,
        layout._replace(dim=letters.out.index(letter)),
    )  # fmt: skip
    return out


def _is_plain(letters: Letters, rows: Tensor, weight: Tensor) -> bool:
    """Return whether every letter is in two terms, once in each, and stands for one size."""
    terms = tuple(letters)
    if any(len(set(term)) != len(term) for term in terms):
        return False
    if any(sum(c in term for term in terms) < 2 for c in "".join(terms)):
        return False
    if (len(letters.rows), len(letters.weight)) != (rows.dim(), weight.dim()):
        return False
    sizes = dict(zip(letters.rows, rows.shape, strict=True))
    return all(
        sizes.get(c, size) == size for c, size in zip(letters.weight, weight.shape, strict=True)
    )


def _bilinear_arguments(input1: Any, input2: Any, weight: Any, bias: Any = None) -> Args:
    return input1, input2, weight, bias


def _bilinear(mode: Interception, func: Func, args: Args, kwargs: Kwargs) -> Any:
    """Rows are in the same dimension of both inputs; where they are not, the slice rule."""
    left, right, weight, bias = bind(_bilinear_arguments, args, kwargs)
    roots = mode.root_of(weight), mode.root_of(bias)
    layout = None
    if mode.root_of(left) is None and mode.root_of(right) is None and not weight.is_complex():
        shape = tuple(left.shape[:-1])
        layout = mode.find(shape, left, roots, "bilinear")
        if layout != mode.find(tuple(right.shape[:-1]), right, roots, "bilinear"):
            layout = None
    if layout is None:
        return slice_rule(mode, func, args, kwargs)
    return apply(
        StratifiedBilinear,
        left,
        right,
        detached(weight, roots[0]),
        detached(bias, roots[1]),
        mode.dense_leaf(roots[0], "bilinear", layout),
        mode.dense_leaf(roots[1], "bilinear", layout),
        mode.rows.groups_of(layout, shape),
        layout,
    )


def product_rules() -> dict[Any, BoundaryRule]:
    """Return the boundary rules of products by torch function."""
    rules: dict[Any, BoundaryRule] = {torch.einsum: _einsum, torch.bilinear: _bilinear}
    return rules | dict.fromkeys((torch.bmm, Tensor.bmm), _bmm)
