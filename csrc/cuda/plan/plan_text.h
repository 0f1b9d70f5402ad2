// Plans and problems in words, for DGL_EXT_LOG=plan.
#pragma once

#include <sstream>
#include <string>

#include "cuda/plan/plan.h"

namespace dgl_ext {

inline std::string describe(const LinearHead& head) {
  std::ostringstream text;
  text << head.rows << "x";
  for (int i = 0; i < head.modalities; ++i) text << (i ? "+" : "") << head.width[i];
  text << "x" << head.classes;
  return text.str();
}
inline std::string describe(const FilmHead& head) {
  std::ostringstream text;
  text << head.rows << "x" << head.condition_width << "+" << head.hidden << "x" << head.classes;
  return text.str();
}

inline const char* tile_name(Tile tile) {
  constexpr const char* kNames[kTileCount] = {"float64",    "float32_small", "float32_medium",
                                              "tf32_small", "tf32_medium",   "half_small",
                                              "half_medium"};
  return kNames[static_cast<int>(tile)];
}
/// Executor, tile and grid; a library plan has kernels on that grid between its products.
inline std::string describe(const LaunchShape& launch) {
  std::ostringstream text;
  if (launch.executor == Executor::kLibrary) {
    text << "library";
  } else {
    text << "fused, tile " << tile_name(launch.tile) << (launch.aligned ? "" : " unaligned");
  }
  text << ", grid " << launch.grid << ", workspace " << launch.workspace_bytes << " bytes";
  return text.str();
}

inline std::string splits_of(const LinearForwardPlan& plan) {
  int64_t splits = 0;
  for (int64_t count : plan.splits) splits += count;
  return std::to_string(plan.direct ? 1 : splits);
}
inline std::string splits_of(const LinearBackwardPlan& plan) {
  return std::to_string(plan.row_splits);
}
inline std::string splits_of(const FilmForwardPlan& plan) {
  return std::to_string(plan.film_splits) + "/" + std::to_string(plan.head_splits);
}
inline std::string splits_of(const FilmBackwardPlan& plan) {
  return std::to_string(plan.out_splits) + "/" + std::to_string(plan.row_splits);
}

template <class Plan>
std::string describe(const Plan& plan) {
  return describe(plan.launch) + ", splits " + splits_of(plan);
}
template <class Plan>
std::string describe_step(const Plan& plan) {
  return describe(plan.launch) + ", splits " + splits_of(plan.forward) + ", " +
         splits_of(plan.backward) + ", chunks " + std::to_string(plan.step.chunks) + " of " +
         std::to_string(plan.step.chunk_rows) + " rows";
}
inline std::string describe(const LinearStepPlan& plan) { return describe_step(plan); }
inline std::string describe(const FilmStepPlan& plan) { return describe_step(plan); }

}  // namespace dgl_ext
