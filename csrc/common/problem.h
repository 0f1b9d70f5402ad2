// The problem as plain structs: what a head computes, on which memory. No torch, no CUDA.
//
// Conventions. Every pointer is untyped; `Dtype` of the call says what it points to, and all
// tensors of a call share that dtype (biases and gradients included). A matrix has contiguous
// columns and rows `stride` ELEMENTS apart; any stride and any alignment is correct, strides and
// base addresses that are multiples of 16 bytes are fast. Outputs must not overlap anything.
// A null pointer means: not there (bias), nothing arrives (incoming gradient), not wanted (output),
// no row lacks the modality (`present`, else one byte per row, 0 or 1). The feature of an absent
// row counts as zero and its gradient is zero, whatever is stored there.
#pragma once

#include <cstdint>

namespace dgl_ext {

constexpr int kMaxModalities = 8;

enum class Dtype { kFloat64, kFloat32, kBFloat16, kFloat16 };

constexpr int64_t element_size(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}
/// Sums and saved intermediates of 16-bit types are float32.
constexpr int64_t accumulator_size(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : 4; }

struct ConstMatrix {
  const void* data = nullptr;
  int64_t stride = 0;
};
struct Matrix {
  void* data = nullptr;
  int64_t stride = 0;
};

/// The same matrix, `elements` further on.
inline ConstMatrix moved(const ConstMatrix& m, int64_t elements, Dtype dtype) {
  return {static_cast<const char*>(m.data) + elements * element_size(dtype), m.stride};
}
inline Matrix moved(const Matrix& m, int64_t elements, Dtype dtype) {
  return {static_cast<char*>(m.data) + elements * element_size(dtype), m.stride};
}

/// Shares of the gradients that the truncations let through (docs/modes.md).
struct Leaks {
  double encoder = 0;  ///< of the fused branch's gradient, to the features
  double head = 0;     ///< of the unimodal branches' gradients, to the parameters
};

/// Concat and sum in one: z_i = h_i W_i^T + branch bias, z = sum_i h_i W_i^T + fused bias.
/// For concat the weights are column slices of one matrix, for sum they are separate.
struct LinearHead {
  int64_t rows = 0, classes = 0;
  int modalities = 0;  ///< 1 to kMaxModalities
  int64_t width[kMaxModalities] = {};
  ConstMatrix feature[kMaxModalities];  ///< (rows, width[i])
  ConstMatrix weight[kMaxModalities];   ///< (classes, width[i])
  /// Concat: the shared bias, added once to z. Null: z gets the sum of the branch biases.
  const void* fused_bias = nullptr;
  const void* branch_bias[kMaxModalities] = {};  ///< concat: the shared bias M times; sum: b_i
  const uint8_t* present[kMaxModalities] = {};
};

struct LinearHeadForward {
  LinearHead head;
  Matrix fused;                     ///< (rows, classes)
  Matrix unimodal[kMaxModalities];  ///< (rows, classes) each
};

/// With g, g_i the incoming gradients:
///   grad_feature[i]     = (g_i + encoder g) W_i
///   grad_weight[i]      = (g + head g_i)^T h_i
///   grad_fused_bias     = sum over rows of g + head * sum_i g_i     (concat's only bias)
///   grad_branch_bias[i] = sum over rows of g + head * g_i           (sum's biases)
/// A gradient into which nothing flows must not be wanted (see the *_flows functions).
struct LinearHeadBackward {
  LinearHead head;
  Leaks leaks;
  ConstMatrix grad_fused;                     ///< (rows, classes)
  ConstMatrix grad_unimodal[kMaxModalities];  ///< (rows, classes)
  Matrix grad_feature[kMaxModalities];        ///< (rows, width[i])
  Matrix grad_weight[kMaxModalities];         ///< (classes, width[i])
  void* grad_fused_bias = nullptr;            ///< (classes)
  void* grad_branch_bias[kMaxModalities] = {};
};

/// FiLM: [gamma|beta] = x W_f^T + b_f, h = gamma y + beta, z = h W_o^T + b_o;
/// alone, x gives h_x = beta and y gives h_y = b_gamma y + b_beta, through the same W_o, b_o.
struct FilmHead {
  int64_t rows = 0, condition_width = 0, hidden = 0, classes = 0;
  ConstMatrix condition;            ///< x (rows, condition_width)
  ConstMatrix target;               ///< y (rows, hidden)
  ConstMatrix film_weight;          ///< W_f (2 hidden, condition_width)
  ConstMatrix out_weight;           ///< W_o (classes, hidden)
  const void* film_bias = nullptr;  ///< b_f (2 hidden)
  const void* out_bias = nullptr;   ///< b_o (classes)
  const uint8_t* present[2] = {};   ///< of x and of y
};

struct FilmHeadForward {
  FilmHead head;
  Matrix fused;        ///< (rows, classes)
  Matrix unimodal[2];  ///< (rows, classes): x alone, y alone
  Matrix modulation;   ///< [gamma|beta] (rows, 2 hidden) in the ACCUMULATOR type, for backward
};

/// With dh = g W_o, dh_x = g_x W_o, dh_y = g_y W_o:
///   grad_condition   = encoder ([dh y|dh] W_f) + dh_x W_beta
///   grad_target      = encoder gamma dh + b_gamma dh_y
///   grad_film_weight = [dh y | dh + head dh_x]^T x
///   grad_film_bias   = sum over rows of [dh y + head dh_y y | dh + head (dh_x + dh_y)]
///   grad_out_weight  = g^T h + head (g_x^T h_x + g_y^T h_y)
///   grad_out_bias    = sum over rows of g + head (g_x + g_y)
struct FilmHeadBackward {
  FilmHead head;
  Leaks leaks;
  ConstMatrix modulation;  ///< as the forward launch saved it
  ConstMatrix grad_fused;
  ConstMatrix grad_unimodal[2];
  Matrix grad_condition;           ///< (rows, condition_width)
  Matrix grad_target;              ///< (rows, hidden)
  Matrix grad_film_weight;         ///< (2 hidden, condition_width)
  Matrix grad_out_weight;          ///< (classes, hidden)
  void* grad_film_bias = nullptr;  ///< (2 hidden)
  void* grad_out_bias = nullptr;   ///< (classes)
};

/// The losses of a training step: cross-entropy of every branch with one target, and
/// total = fused + sum_i alpha[i] unimodal_i. Meanings as in torch.nn.functional.cross_entropy. A
/// row counts where its target is not `ignore_index`, and for branch i also only where it is
/// present. With t_c = class_weight_c ((1 - smoothing) [c is the target] + smoothing / classes), or
/// the soft target's share in place of [...], a row costs -sum_c t_c log softmax(z)_c. Means divide
/// by the sum over the rows that count of sample weights times the target's class weight (soft
/// targets: of sample weights); where that is 0, the mean is NaN and every gradient 0, but a
/// modality that no counted row has costs 0.
/// The loss dtype is float64 for float64, else float32.
struct CrossEntropy {
  const int64_t* target = nullptr;  ///< (rows), one after the other; null: `soft_target`
  ConstMatrix soft_target;          ///< (rows, classes) of `soft_dtype`; every row counts
  Dtype soft_dtype = Dtype::kFloat32;
  const void* class_weight = nullptr;   ///< (classes) of the loss dtype; null: ones
  const void* sample_weight = nullptr;  ///< (rows) of the loss dtype; null: ones
  double alpha[kMaxModalities] = {};
  bool mean = true;
  int64_t ignore_index = -100;
  double label_smoothing = 0;
  // Results, those of the fused branch first. A row that does not count has a loss of 0; every row
  // has a prediction, the first class of the largest logit.
  void* total = nullptr;           ///< one number of the loss dtype
  void* branch_losses = nullptr;   ///< (branches) of the loss dtype
  int64_t* correct = nullptr;      ///< (branches): counted rows whose prediction is right
  int64_t* counted = nullptr;      ///< (branches): rows that count
  void* losses = nullptr;          ///< (branches, rows) of the loss dtype, before sample weights
  int64_t* predictions = nullptr;  ///< (branches, rows)
};

/// Gradients have the dtype of the problem, but float32 where that is float16: 1 / rows times a
/// residual would underflow there. g is the gradient of the fused loss, alpha_i g_i that of branch
/// i; gradients are then those of LinearHeadBackward.
struct LinearHeadStep : LinearHeadBackward {  // but no gradient comes in
  CrossEntropy loss;
};

/// The same for FiLM.
struct FilmHeadStep : FilmHeadBackward {
  CrossEntropy loss;
};

/// to[i] = scale * from[i] for several arrays: a step's gradients times the gradient of its total.
constexpr int kMaxScaled = 3 * kMaxModalities;
struct ScaledGradients {
  int count = 0;
  const void* from[kMaxScaled] = {};
  void* to[kMaxScaled] = {};  ///< the same as `from` to scale in place
  int64_t size[kMaxScaled] = {};
  const void* scale = nullptr;  ///< one number of the loss dtype, on the device
  Dtype dtype = Dtype::kFloat32;
  bool to_float16 = false;  ///< float32 gradients, rounded to float16
};

/// Does any incoming gradient reach this one?
inline bool feature_flows(const LinearHeadBackward& p, int i) {
  return p.grad_unimodal[i].data || (p.grad_fused.data && p.leaks.encoder != 0);
}
inline bool weight_flows(const LinearHeadBackward& p, int i) {
  return p.grad_fused.data || (p.grad_unimodal[i].data && p.leaks.head != 0);
}
inline bool fused_bias_flows(const LinearHeadBackward& p) {
  for (int i = 0; i < p.head.modalities; ++i) {
    if (weight_flows(p, i)) return true;
  }
  return false;
}
inline bool condition_flows(const FilmHeadBackward& p) {
  return p.grad_unimodal[0].data || (p.grad_fused.data && p.leaks.encoder != 0);
}
inline bool target_flows(const FilmHeadBackward& p) {
  return p.grad_unimodal[1].data || (p.grad_fused.data && p.leaks.encoder != 0);
}
/// The film weight sees y alone only through its bias: g_y never reaches it.
inline bool film_weight_flows(const FilmHeadBackward& p) {
  return p.grad_fused.data || (p.grad_unimodal[0].data && p.leaks.head != 0);
}
inline bool parameters_flow(const FilmHeadBackward& p) {
  return p.grad_fused.data ||
         ((p.grad_unimodal[0].data || p.grad_unimodal[1].data) && p.leaks.head != 0);
}

}  // namespace dgl_ext
