// The arguments of the linear head (concat and sum) as matrices; see linear_head.cpp.

#pragma once

#include <functional>
#include <numeric>
#include <vector>

#include "cpu/matrix.h"

namespace dgl_ext::cpu {

struct LinearHead {
  Shape leading;
  int64_t rows;
  int64_t classes;
  ScalarType storage;  // of the arguments
  ScalarType compute;
  bool shared;  // one weight and one bias for all modalities
  std::vector<MatrixView> features;
  std::vector<MatrixView> weights;  // per modality: (C, D_i)

  int64_t modalities() const { return static_cast<int64_t>(features.size()); }
};

inline LinearHead parse_linear_head(const Checks& checks, const std::vector<Tensor>& features,
                                    const std::vector<Tensor>& weights) {
  LinearHead head;
  head.leading = checks.features(features, 1, kMaxModalities);
  head.rows = std::accumulate(head.leading.begin(), head.leading.end(), int64_t{1},
                              std::multiplies<int64_t>());
  head.storage = features[0].scalar_type();
  head.compute = compute_dtype(head.storage);
  head.shared = weights.size() == 1;
  for (const Tensor& feature : features) {
    head.features.push_back(MatrixView::from_rows(to_compute(feature)));
  }
  if (!head.shared) checks.length("weights", weights.size(), features.size());
  if (weights[0].dim() != 2) {
    checks.fail("weights[0]", "shape (C, D)", to_string(shape_of(weights[0])));
  }
  head.classes = weights[0].size(0);
  int64_t width = 0;
  for (const MatrixView& feature : head.features) width += feature.cols;
  for (size_t i = 0; i < weights.size(); ++i) {
    const std::string name = Checks::indexed("weights", i);
    checks.like(name, weights[i], features[0]);
    checks.shape(name, weights[i], {head.classes, head.shared ? width : head.features[i].cols});
  }
  if (head.shared) {
    const MatrixView weight = MatrixView::from_rows(to_compute(weights[0]));
    int64_t begin = 0;
    for (const MatrixView& feature : head.features) {
      head.weights.push_back(weight.columns(begin, feature.cols));
      begin += feature.cols;
    }
  } else {
    for (const Tensor& weight : weights) {
      head.weights.push_back(MatrixView::from_rows(to_compute(weight)));
    }
  }
  return head;
}

}  // namespace dgl_ext::cpu
