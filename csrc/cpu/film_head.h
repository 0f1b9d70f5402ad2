// The arguments of the FiLM head as matrices; see film_head.cpp.

#pragma once

#include <vector>

#include "cpu/matrix.h"

namespace dgl_ext::cpu {

enum Branch : int64_t { kFused, kOfX, kOfY };
constexpr int64_t kBranches = 3;

struct FilmArguments : FilmSizes {
  ScalarType storage;  // of the arguments
  ScalarType compute;
  MatrixView x;
  MatrixView y;
  MatrixView film_weight;  // (2H, D_x)
  MatrixView out_weight;   // (C, H)
};

inline FilmArguments parse_film_head(const Checks& checks, const std::vector<Tensor>& features,
                                     const std::vector<Tensor>& weights) {
  const auto matrix = [](const Tensor& of) { return MatrixView::from_rows(to_compute(of)); };
  const FilmSizes sizes = checks.film(features, weights);
  const ScalarType storage = features[0].scalar_type();
  return {sizes,
          storage,
          compute_dtype(storage),
          matrix(features[0]),
          matrix(features[1]),
          matrix(weights[0]),
          matrix(weights[1])};
}

}  // namespace dgl_ext::cpu
