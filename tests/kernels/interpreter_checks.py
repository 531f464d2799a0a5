"""What the checks in Triton's interpreter share; imported in its process."""

from __future__ import annotations

from contextlib import contextmanager

import torch


@contextmanager
def poisoned_scratch():
    """Fill what ``torch.empty`` and ``new_empty`` give with NaN, and yield the list of it."""
    empty, new_empty, made = torch.empty, torch.Tensor.new_empty, []

    def poison(x):
        made.append(x)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    torch.empty = lambda *args, **kwargs: poison(empty(*args, **kwargs))
    torch.Tensor.new_empty = lambda *args, **kwargs: poison(new_empty(*args, **kwargs))
    try:
        yield made
    finally:
        torch.empty, torch.Tensor.new_empty = empty, new_empty


def guarded(*shape, dtype=torch.float32):
    """Return a tensor of NaN with as much before and after it, and the whole of it."""
    whole = torch.full((3, *shape), torch.nan, dtype=dtype)
    return whole[1], whole


def surrounded(x, margin=8):
    """Return [N, D] with the numbers of ``x`` in the middle of NaN on all sides."""
    count, width = x.shape
    whole = torch.full((count + 2, width + 2 * margin), torch.nan, dtype=x.dtype)
    inner = whole[1:-1, margin : margin + width]
    inner.copy_(x)
    return inner


def assert_guards_hold(whole):
    """Check that nothing was written before or after what ``guarded`` returned."""
    assert whole[0].isnan().all()
    assert whole[2].isnan().all()


def run_checks(checks):
    """Run the checks and print the names of those that passed: the body of the script."""
    torch.manual_seed(0)
    for check in checks:
        check()
        print(check.__name__, flush=True)
