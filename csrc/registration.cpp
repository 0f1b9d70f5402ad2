// What Python sees: the ops' schemas, and a module that is empty because importing it is all that
// is needed to register them. The kernels register themselves in the files that hold them.

#include <Python.h>
#include <torch/csrc/stable/library.h>

// `weights` and `biases` of a linear head are one (C, sum D) weight with one bias (concat), or one
// (C, D_i) weight and bias per modality (sum). `grad_outputs` has the fused logits' gradient first.
// A backward op returns the gradients that the `needs_*` ask for: features, weights, biases.
// On CUDA float32 products may be tf32 where `allow_tf32`; `executor` is 0 for the plan's choice, 1
// for this project's products in one launch, 2 for the library's. On the CPU there are only ours.
// `present` is empty, or has one bool mask of the rows per modality, None where no row lacks it.
#define DGL_EXT_HEAD "Tensor[] features, Tensor[] weights, Tensor?[] biases"
#define DGL_EXT_FORWARD DGL_EXT_HEAD ", Tensor?[] present"
#define DGL_EXT_NEEDS                                                  \
  "bool[] needs_features, bool[] needs_weights, bool[] needs_biases, " \
  "float encoder_leak, float head_leak"
#define DGL_EXT_LINEAR_BACKWARD \
  "Tensor?[] grad_outputs, Tensor[] features, Tensor[] weights, Tensor?[] present, " DGL_EXT_NEEDS
#define DGL_EXT_FILM_BACKWARD                                                              \
  "Tensor?[] grad_outputs, Tensor[] features, Tensor[] weights, Tensor?[] biases, Tensor " \
  "film, Tensor?[] present, " DGL_EXT_NEEDS
#define DGL_EXT_PATH ", bool allow_tf32=False, int executor=0"
// A step takes the cross-entropy of every branch with one target and computes every gradient of
// total = fused + sum_i alpha_i unimodal_i at once. `workspace_limit` bounds, in bytes, what the
// step keeps of logits and residuals at a time (0: the device's default); more rows than fit run in
// chunks.
#define DGL_EXT_STEP                                                                  \
  DGL_EXT_HEAD                                                                        \
  ", Tensor target, Tensor? class_weight, Tensor? sample_weight, Tensor?[] present, " \
  "float[] alpha, bool mean, int ignore_index, "                                      \
  "float label_smoothing, " DGL_EXT_NEEDS ", int workspace_limit"

// film_head_forward returns the logits (fused, of x, of y) and the modulation [gamma | beta], which
// the backward op takes.
STABLE_TORCH_LIBRARY(dgl_ext, m) {
  m.def("linear_head_forward(" DGL_EXT_FORWARD DGL_EXT_PATH ") -> Tensor[]");
  m.def("linear_head_backward(" DGL_EXT_LINEAR_BACKWARD DGL_EXT_PATH ") -> Tensor[]");
  m.def("film_head_forward(" DGL_EXT_FORWARD DGL_EXT_PATH ") -> Tensor[]");
  m.def("film_head_backward(" DGL_EXT_FILM_BACKWARD DGL_EXT_PATH ") -> Tensor[]");
  // -> [total, branch_losses (M + 1), correct (M + 1), counted (M + 1), losses (M + 1, ...),
  // predictions (M + 1, ...), then the gradients that the `needs_*` ask for].
  // Float16 problems get float32 gradients, which do not underflow before they are scaled.
  m.def("linear_head_step(" DGL_EXT_STEP DGL_EXT_PATH ") -> Tensor[]");
  m.def("film_head_step(" DGL_EXT_STEP DGL_EXT_PATH ") -> Tensor[]");
  // A step's gradients times the gradient of its total, in place or as new tensors.
  m.def("scale_gradients_(Tensor(a!)[] grads, Tensor scale) -> ()");
  m.def("scale_gradients(Tensor[] grads, Tensor scale, bool to_float16) -> Tensor[]");
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "dgl_ext._C", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
