"""The Triton backend in Triton's interpreter, in a process of its own.

Run as a script, this file is that process: it prints a line per check.
"""

from __future__ import annotations

import pytest
import torch

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def passed(interpreted):
    """Return the names of the checks that passed in the process with the interpreter."""
    return interpreted(__file__)


def make_case(count, wide, deep, heads, is_sorted, dtype=torch.float32, k=0, has_bias=True):
    """Return grad, rows, weight, bias and the routes."""
    from routed_linear_cases import LAYOUTS, make, make_routes

    generator = torch.Generator().manual_seed(count)
    grad = make((count, wide), LAYOUTS[k % 5], dtype, generator)
    rows = make((count, deep), LAYOUTS[(k + 1) % 5], dtype, generator)
    weight = make((heads, wide, deep), LAYOUTS[(k + 3) % 5], dtype, generator)
    bias = make((heads, wide), LAYOUTS[k % 5], dtype, generator) if has_bias else None
    return grad, rows, weight, bias, make_routes(count, heads, is_sorted, generator)


def assert_right(out, outs, case):
    """Check outputs and gradients; 16 bits are rounded once more than the sums in float32."""
    import routed_linear_cases as cases

    grad, rows, weight, bias, (ids, _, _) = case
    dtype = rows.dtype
    assert all(x.dtype == dtype for x in (out, *outs))
    if dtype not in HALVES:
        cases.assert_close(out, rows, weight, bias, ids)
        cases.assert_gradients_close(outs, grad, rows, weight, ids)
        return
    right = cases.oracle(rows, weight, bias, ids)
    size = cases.oracle(rows.abs(), weight.abs(), None if bias is None else bias.abs(), ids)
    pairs = [(out, right, size)]
    pairs += zip(
        outs, cases.gradient_oracle(grad, rows, weight, ids),
        cases.gradient_oracle(grad.abs(), rows.abs(), weight.abs(), ids), strict=True,
    )  # fmt: skip
    for got, expected, scale in pairs:
        assert ((got.double() - expected).abs() <= 2 * torch.finfo(dtype).eps * scale).all()


def run(case, backend="triton", **options):
    from pinet_fast.kernels import routed_linear

    grad, *leaves, routes = case
    leaves = [None if x is None else x.detach().requires_grad_() for x in leaves]
    out = routed_linear(*leaves, *routes, backend=backend, **options)
    out.backward(grad)
    rows, weight, bias = (None if x is None else x.grad for x in leaves)
    return out.detach(), [rows, weight, bias]


def check_agrees_with_the_oracle():
    from pinet_fast.kernels import _registry

    dtypes = (torch.float32, *HALVES)
    sizes = [(0, 4, 5, 2), (1, 1, 1, 1), (70, 5, 33, 3), (200, 24, 17, 4), (90, 65, 70, 9)]
    for i, (count, wide, deep, heads) in enumerate(sizes):
        for k in range(5):
            case = make_case(count, wide, deep, heads, k % 2 == 0, dtypes[(i + k) % 3], k)
            assert_right(*run(case), case)
    assert _registry.num_calls("routed_linear", "triton") == 25
    assert _registry.num_calls("routed_linear_backward", "triton") == 25


def check_any_order_of_programs_gives_the_same_bits():
    from pinet_fast.kernels.routed_linear import _triton

    for is_sorted in (True, False):
        case = make_case(700, 70, 130, 4, is_sorted)
        grad, rows, weight, bias, routes = case
        results = []
        for reverse in (False, True, False):
            shapes = ((700, 70), (700, 130), (4, 70, 130), (4, 70))
            out, *outs = (torch.full(shape, torch.nan) for shape in shapes)
            _triton.run_forward(rows, weight, bias, *routes, out, reverse=reverse)
            _triton.run_backward(grad, rows, weight, *routes, *outs, reverse=reverse)
            results.append((out, *outs))
        assert_right(results[0][0], results[0][1:], case)
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def check_reads_and_writes_nothing_outside():
    from interpreter_checks import assert_guards_hold, guarded, poisoned_scratch, surrounded

    from pinet_fast.kernels.routed_linear import _triton

    for count, wide, deep, heads in ((1, 1, 1, 1), (33, 7, 20, 3), (150, 17, 65, 9)):
        for is_sorted in (True, False):
            grad, rows, *others = make_case(count, wide, deep, heads, is_sorted)
            case = (surrounded(grad), surrounded(rows), *others)
            grad, rows, weight, bias, routes = case
            shapes = ((count, wide), (count, deep), (heads, wide, deep), (heads, wide))
            (out, *outs), wholes = zip(*(guarded(*shape) for shape in shapes), strict=True)
            with poisoned_scratch():
                _triton.run_forward(rows, weight, bias, *routes, out)
                _triton.run_backward(grad, rows, weight, *routes, *outs)
            assert_right(out, outs, case)
            for whole in wholes:
                assert_guards_hold(whole)


def check_without_bias_and_what_is_not_needed():
    from pinet_fast.kernels import routed_linear

    grad, rows, weight, _, routes = make_case(40, 6, 9, 3, False, has_bias=False)
    whole = run((grad, rows, weight, None, routes), backend="reference")
    for names in (("rows",), ("weight",)):
        leaves = {"rows": rows.detach().clone(), "weight": weight.detach().clone()}
        for name in names:
            leaves[name].requires_grad_()
        out = routed_linear(leaves["rows"], leaves["weight"], None, *routes, backend="triton")
        out.backward(grad)
        torch.testing.assert_close(out.detach(), whole[0], rtol=1e-5, atol=1e-5)
        for name, right in zip(("rows", "weight"), whole[1][:2], strict=True):
            assert (leaves[name].grad is not None) == (name in names)
            if name in names:
                torch.testing.assert_close(leaves[name].grad, right, rtol=1e-5, atol=1e-5)


def check_bad_numbers_stay_and_heads_without_rows_get_zeros():
    grad, rows, weight, bias, _ = make_case(60, 6, 9, 4, True)
    ids = torch.arange(60) % 3 + 1  # head 0 has no rows
    order = torch.argsort(ids, stable=True)
    routes = (ids, (0, 0, 20, 40, 60), order)
    rows = rows.clone()
    rows[10, 4] = torch.nan  # of head 2
    out, (of_rows, of_weight, of_bias) = run((grad, rows, weight, bias, routes))
    assert out.isnan().any(1).nonzero().flatten().tolist() == [10]
    assert of_rows.isfinite().all()
    assert of_weight.isnan().nonzero()[:, [0, 2]].unique(dim=0).tolist() == [[2, 4]]
    assert (of_weight[0] == 0).all()
    assert (of_bias[0] == 0).all()
    rows[10, 4] = 0.0
    weight = weight.clone()
    weight[0] = torch.nan  # read by nobody
    out, _ = run((grad, rows, weight, bias, routes))
    assert out.isfinite().all()


def launched_precisions(case, **options):
    """Return the precision of every product that a forward and a backward launch."""
    from pinet_fast.kernels.routed_linear import _triton
    from pinet_fast.kernels.stratified_linear import _triton as by_stratum

    seen = []

    class Watched:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*arguments, **options):
                seen.append(options["PRECISION"])
                return self.kernel[grid](*arguments, **options)

            return launch

    kept = _triton._routed_kernel, by_stratum._wgrad_kernel
    _triton._routed_kernel, by_stratum._wgrad_kernel = (Watched(kernel) for kernel in kept)
    try:
        run(case, **options)
    finally:
        _triton._routed_kernel, by_stratum._wgrad_kernel = kept
    return seen


def check_every_launch_has_the_precision_asked_for():
    case = make_case(40, 6, 9, 3, False)
    assert launched_precisions(case) == ["ieee"] * 3  # forward, rows' gradient, weights' gradient
    for precision in ("ieee", "tf32", "tf32x3"):
        assert launched_precisions(case, precision=precision) == [precision] * 3
        for dtype in HALVES:  # their products have no choice
            halves = make_case(40, 6, 9, 3, False, dtype)
            assert launched_precisions(halves, precision=precision) == ["ieee"] * 3


def check_tf32_rounds_to_the_nearest_of_ten_bits():
    from routed_linear_cases import assert_close, gradient_oracle, rounding

    case = make_case(200, 20, 24, 3, True)
    grad, rows, weight, bias, routes = case
    out, gradients = run(case, precision="tf32")

    def rounded(x):
        mantissa, exponent = torch.frexp(x.double())
        kept = (mantissa.abs() * 2**11 + 0.5).floor()  # ties away from zero
        return torch.ldexp(kept.copysign(x.double()), exponent - 11).float()

    near = [rounded(x) for x in (grad, rows, weight)]
    assert_close(out, *near[1:], bias, routes[0])
    right = gradient_oracle(*near, routes[0])
    size = gradient_oracle(*(x.abs() for x in near), routes[0])
    for found, expected, scale in zip(gradients[:2], right, size, strict=False):
        assert ((found.double() - expected).abs() <= rounding(torch.float32, 200) * scale).all()
    exact = run(case, precision="tf32x3")
    assert_right(*exact, case)
    assert not torch.equal(out, exact[0])
    assert not any(torch.equal(a, b) for a, b in zip(gradients[:2], exact[1][:2], strict=True))


def check_an_unknown_precision_is_refused():
    from pinet_fast.errors import InputError

    with pytest.raises(InputError, match="precision: expected one of ieee, tf32, tf32x3, got 'x'"):
        run(make_case(5, 2, 3, 2, True), precision="x")


def check_what_is_unsupported_has_a_reason():
    from pinet_fast.errors import BackendUnavailableError

    with pytest.raises(BackendUnavailableError, match="no Triton kernel for float64"):
        run(make_case(5, 2, 3, 2, True, torch.float64))


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.interpret
@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_in_the_interpreter(passed, check):
    assert check in passed


if __name__ == "__main__":
    from interpreter_checks import run_checks

    run_checks(CHECKS)
