// ragged_attention: causal softmax attention of every event over its user's events so far.
//
// For user u with rows a = offsets[u] <= i < offsets[u + 1], head h, and scale = 1 / sqrt(D):
//
//     score[i, j] = scale q[i, h] . k[j, h]                     a <= j <= i
//     lse[i, h]   = log sum_j exp(score[i, j])
//     out[i, h]   = sum_j exp(score[i, j] - lse[i, h]) keep[i, h, j - a] v[j, h]
//
// qkv      [T, 3, H, D] float32 or float64: queries, keys, values; elements of D next to each other,
//          any other strides.
// offsets  [B + 1] int64, contiguous, ascending from 0 to T.
// dropout  0 <= dropout < 1: keep is 0 with this probability, else 1 / (1 - dropout), both rounded to
//          2^-32; without dropout it is 1. It is computed anew in the backward, from `seed`.
// out      [T, H, D], lse [T, H]: contiguous, every element is written.
//
// The backward takes what the forward took and gave, and grad [T, H, D] with elements of D next to
// each other; it writes grad_qkv [T, 3, H, D], contiguous, every element.
//
// No user's rows are read for another. Work is cut by lengths alone and sums are in a fixed order,
// so no bit depends on threads.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace pinet {

void ragged_attention_cpu(torch::stable::Tensor qkv, torch::stable::Tensor offsets, double dropout,
                          int64_t seed, torch::stable::Tensor out, torch::stable::Tensor lse);

void ragged_attention_backward_cpu(torch::stable::Tensor grad, torch::stable::Tensor qkv,
                                   torch::stable::Tensor offsets, double dropout, int64_t seed,
                                   torch::stable::Tensor out, torch::stable::Tensor lse,
                                   torch::stable::Tensor grad_qkv);

}  // namespace pinet
