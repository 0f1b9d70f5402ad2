// The arguments of the FiLM head as matrices; see film_head.cpp.

#pragma once

#include <functional>
#include <numeric>
#include <utility>
#include <vector>

#include "cpu/matrix.h"

namespace dgl_ext::cpu {

enum Branch : int64_t { kFused, kOfX, kOfY };
constexpr int64_t kBranches = 3;

struct FilmHead {
  Shape leading;
  int64_t rows;
  int64_t hidden;
  int64_t classes;
  ScalarType storage;  // of the arguments
  ScalarType compute;
  MatrixView x;
  MatrixView y;
  MatrixView film_weight;  // (2H, D_x)
  MatrixView out_weight;   // (C, H)
};

inline FilmHead parse_film_head(const Checks& checks, const std::vector<Tensor>& features,
                                const std::vector<Tensor>& weights) {
  Shape leading = checks.features(features, 2, 2);
  const int64_t rows =
      std::accumulate(leading.begin(), leading.end(), int64_t{1}, std::multiplies<int64_t>());
  checks.length("weights", weights.size(), 2);
  const MatrixView x = MatrixView::from_rows(to_compute(features[0]));
  const MatrixView y = MatrixView::from_rows(to_compute(features[1]));
  for (size_t i = 0; i < weights.size(); ++i) {
    checks.like(Checks::indexed("weights", i), weights[i], features[0]);
  }
  if (weights[1].dim() != 2) {
    checks.fail("weights[1]", "shape (C, H)", to_string(shape_of(weights[1])));
  }
  const int64_t classes = weights[1].size(0);
  checks.shape("weights[0]", weights[0], {2 * y.cols, x.cols});
  checks.shape("weights[1]", weights[1], {classes, y.cols});
  const ScalarType storage = features[0].scalar_type();
  return FilmHead{std::move(leading),
                  rows,
                  y.cols,
                  classes,
                  storage,
                  compute_dtype(storage),
                  x,
                  y,
                  MatrixView::from_rows(to_compute(weights[0])),
                  MatrixView::from_rows(to_compute(weights[1]))};
}

}  // namespace dgl_ext::cpu
