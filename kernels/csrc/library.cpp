// Schemas of all compiled ops, namespace `pinet_cpp`. Each op's own source registers its kernel.
//
// These are the raw kernels behind `torch.ops.pinet.*`: they write into tensors that the caller
// allocated, except where sizes depend on values, and check only what would otherwise be undefined
// behaviour. Validation, fake kernels and the public functions are in Python (`kernels/<op>/op.py`).

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(pinet_cpp, m) {
  m.def("stratum_gram(Tensor[] grads, Tensor(a!) out) -> ()");
  m.def(
      "stratum_solve(Tensor gram, int rule, int[] kept, float c, Tensor? keys, Tensor(a!) out)"
      " -> ()");
  m.def(
      "stratum_combine(Tensor[] grads, Tensor weights, Tensor? scale, Tensor(a!)[] outs,"
      " int[] accumulate, Tensor[] rows, int[] row_of) -> ()");
  m.def(
      "stratified_embedding_reduce(Tensor[] ids, Tensor[] strata, Tensor[] grads, int num_strata,"
      " int num_rows) -> (Tensor, Tensor, Tensor)");
  m.def(
      "stratified_embedding_add(Tensor(a!) dense, Tensor[] ids, Tensor[] strata, Tensor[] grads)"
      " -> ()");
  m.def(
      "stratified_linear_backward(Tensor grad, Tensor? weight, Tensor sorted_grad,"
      " Tensor sorted_rows, int[] row_offsets, Tensor ids, Tensor(a!)? grad_rows,"
      " Tensor(b!)? grad_weight, Tensor(c!)? grad_bias) -> ()");
  m.def(
      "stratified_linear_fused(Tensor grad, Tensor? weight, Tensor rows, int[] row_offsets,"
      " Tensor? order, Tensor(a!)? grad_rows, Tensor(b!)? grad_weight, Tensor(c!)? grad_bias)"
      " -> ()");
  m.def("cpu_has_tuned_blas() -> bool");
  m.def("dropout_mask(float rate, int seed, Tensor(a!) out) -> ()");
  m.def(
      "ragged_attention(Tensor qkv, Tensor offsets, float dropout, int seed, Tensor(a!) out,"
      " Tensor(b!) lse) -> ()");
  m.def(
      "ragged_attention_backward(Tensor grad, Tensor qkv, Tensor offsets, float dropout, int seed,"
      " Tensor out, Tensor lse, Tensor(a!) grad_qkv) -> ()");
  m.def(
      "routed_linear(Tensor rows, Tensor weight, Tensor? bias, int[] row_offsets, Tensor(a!) out)"
      " -> ()");
  m.def("stratum_sums(Tensor rows, Tensor ids, Tensor(a!) out) -> ()");
  m.def(
      "stratified_norm_backward(Tensor grad, Tensor rows, Tensor mean, Tensor rstd, Tensor? weight,"
      " Tensor ids, int num_strata, Tensor(a!)? grad_rows, Tensor(b!)? grad_weight,"
      " Tensor(c!)? grad_bias) -> ()");
}
