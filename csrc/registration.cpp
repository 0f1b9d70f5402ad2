// What Python sees: the ops' schemas, and a module that is empty because importing it is all that
// is needed to register them. The kernels register themselves in the files that hold them.

#include <Python.h>
#include <torch/csrc/stable/library.h>

// `weights` and `biases` of a linear head are one (C, sum D) weight with one bias (concat), or one
// (C, D_i) weight and bias per modality (sum). `grad_outputs` has the fused logits' gradient first.
// A backward op returns the gradients that the `needs_*` ask for: features, weights, biases.
STABLE_TORCH_LIBRARY(dgl_ext, m) {
  m.def("linear_head_forward(Tensor[] features, Tensor[] weights, Tensor?[] biases) -> Tensor[]");
  m.def(
      "linear_head_backward(Tensor?[] grad_outputs, Tensor[] features, Tensor[] weights, "
      "bool[] needs_features, bool[] needs_weights, bool[] needs_biases, "
      "float encoder_leak, float head_leak) -> Tensor[]");
  // Returns the logits (fused, of x, of y) and the modulation [gamma | beta] for the backward op.
  m.def("film_head_forward(Tensor[] features, Tensor[] weights, Tensor?[] biases) -> Tensor[]");
  m.def(
      "film_head_backward(Tensor?[] grad_outputs, Tensor[] features, Tensor[] weights, "
      "Tensor?[] biases, Tensor film, "
      "bool[] needs_features, bool[] needs_weights, bool[] needs_biases, "
      "float encoder_leak, float head_leak) -> Tensor[]");
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "dgl_ext._C", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
