from __future__ import annotations

import numpy as np
import pytest
import torch
from host_reads import NoHostReads
from stratum_gram_cases import oracle

from pinet_fast.kernels.stratum_gram import cost, stratum_gram
from pinet_fast.kernels.stratum_gram.reference import by_products


def gram(*grads):
    return stratum_gram(list(grads), backend="reference")


def test_value_worked_by_hand():
    grad = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0]])
    assert gram(grad).tolist() == [[[5.0, 2.0], [2.0, 2.0]]]


def test_loop_in_numpy():
    shapes = [(3, 4, 5), (3,), (3, 0), (3, 1, 2, 2)]
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    out = gram(*grads).numpy()
    for grad, got in zip(grads, out, strict=True):
        rows = grad.numpy().astype(np.float64).reshape(3, grad.numel() // 3)
        for s in range(3):
            for t in range(3):
                assert got[s, t] == pytest.approx(sum(rows[s] * rows[t]), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_a_gpu_gets_is_float64_throughout_and_not_read_on_the_host(dtype):
    generator = torch.Generator().manual_seed(2)
    grads = [
        torch.randn(shape, generator=generator).to(dtype) for shape in ((5, 700), (5,), (5, 0))
    ]
    out = torch.full((3, 5, 5), torch.nan, dtype=torch.float64)
    with NoHostReads():
        by_products(grads, out)
    torch.testing.assert_close(out, oracle(grads), rtol=1e-13, atol=1e-13)


def test_parameters_joined_are_those_alone():
    generator = torch.Generator().manual_seed(3)
    shapes = [(4, 64), (4, 3), (4, 20_000), (4, 0), (4, 130), (4,)]
    dtypes = [torch.float32, torch.float64, torch.float32, torch.float32, torch.float32] * 2
    grads = [
        torch.randn(shape, generator=generator).to(dtype)
        for shape, dtype in zip(shapes, dtypes, strict=False)
    ]
    out = gram(*grads)
    for grad, joined in zip(grads, out, strict=True):
        torch.testing.assert_close(joined, gram(grad)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_dtype_is_summed_in_float64(dtype):
    grad = torch.full((2, 70000), 0.125, dtype=dtype)
    assert gram(grad).dtype == torch.float64
    assert (gram(grad) == 70000 / 64).all()


def test_slices_without_elements_give_zeros():
    assert torch.equal(gram(torch.empty(3, 0)), torch.zeros(1, 3, 3, dtype=torch.float64))


def test_cost_is_one_read_of_each_gradient():
    flop, num_bytes = cost([(8, 1000, 100), (8, 100)], itemsize=4)
    assert flop == 8 * 9 * 100_100
    assert num_bytes == 8 * 100_100 * 4 + 2 * 64 * 8
