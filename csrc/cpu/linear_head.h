// The arguments of the linear head (concat and sum) as matrices; see linear_head.cpp.

#pragma once

#include <vector>

#include "cpu/matrix.h"

namespace dgl_ext::cpu {

struct LinearArguments : LinearSizes {
  ScalarType storage;  // of the arguments
  ScalarType compute;
  std::vector<MatrixView> features;
  std::vector<MatrixView> weights;  // per modality: (C, D_i)

  int64_t modalities() const { return static_cast<int64_t>(features.size()); }
};

inline LinearArguments parse_linear_head(const Checks& checks, const std::vector<Tensor>& features,
                                         const std::vector<Tensor>& weights) {
  const auto matrix = [](const Tensor& of) { return MatrixView::from_rows(to_compute(of)); };
  const LinearSizes sizes = checks.linear(features, weights);
  const ScalarType storage = features[0].scalar_type();
  LinearArguments head{sizes, storage, compute_dtype(storage), {}, {}};
  for (const Tensor& feature : features) head.features.push_back(matrix(feature));
  for (const Tensor& weight : weights) head.weights.push_back(matrix(weight));
  if (head.shared) {
    const MatrixView weight = head.weights[0];
    head.weights.clear();
    for (size_t i = 0; i < features.size(); ++i) {
      head.weights.push_back(weight.columns(head.begin[i], head.features[i].cols));
    }
  }
  return head;
}

}  // namespace dgl_ext::cpu
