// What the steps of all heads share on the CPU: the target and its masks, the losses, and how many
// rows the workspace holds.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "cpu/cross_entropy.h"
#include "cpu/matrix.h"
#include "cpu/present.h"

namespace dgl_ext::cpu {

// Gradients of float16 problems stay in float32: they have yet to meet the incoming gradient.
inline ScalarType gradient_dtype(ScalarType storage) {
  return storage == ScalarType::Half ? ScalarType::Float : storage;
}

// What a step may keep of logits and residuals at a time where the caller says nothing.
constexpr int64_t kDefaultWorkspace = int64_t{64} << 20;

// How many rows at a time keep within the workspace; equal chunks, at least one row. Part of it is
// left to the buffers into which the library packs its operands.
inline int64_t chunk_rows(int64_t rows, int64_t bytes_each, int64_t workspace_limit) {
  constexpr int64_t kLibrary = int64_t{16} << 20;
  const int64_t planes = workspace_limit - std::min(workspace_limit / 4, kLibrary);
  const int64_t most = std::max<int64_t>(1, planes / std::max<int64_t>(1, bytes_each));
  if (rows <= most) return rows;
  const int64_t chunks = (rows + most - 1) / most;
  return (rows + chunks - 1) / chunks;
}

// Calls f(first row, number of rows) for every chunk, and once if there are no rows.
template <typename F>
void for_chunks(int64_t rows, int64_t chunk, const F& f) {
  int64_t begin = 0;
  do {
    f(begin, std::min(chunk, rows - begin));
    begin += chunk;
  } while (begin < rows);
}

// Calls f(begin, end) for a range of rows, a few of them at a time so that their logits stay in
// cache from the products to the residuals.
template <typename F>
void for_cached_rows(int64_t begin, int64_t end, int64_t classes, const F& f) {
  constexpr int64_t kCached = 4096;
  const int64_t step = std::max<int64_t>(1, kCached / std::max<int64_t>(1, classes));
  for (int64_t first = begin; first < end; first += step) f(first, std::min(end, first + step));
}

struct LossOptions {
  const std::vector<double>& alpha;
  bool mean;
  int64_t ignore_index;
  double label_smoothing;
};

// The losses of one step: the fused branch first, then one per modality. Everything that a residual
// is scaled with is known before the first logit: the constructor reads the whole target.
class BranchLosses {
 public:
  BranchLosses(const Checks& checks, int64_t rows, int64_t classes, const Tensor& target,
               const OptionalTensors& present, const LossOptions& options)
      : options_(options),
        modalities_(static_cast<int64_t>(options.alpha.size())),
        target_(flat_data<int64_t>(target, held_)),
        masks_(present, modalities_, rows),
        counts_(modalities_ + 1, 0),
        sums_(modalities_ + 1, 0.0),
        correct_(modalities_ + 1) {
    count(checks, rows, classes);
    for (int64_t i = 0; i < modalities_; ++i) {
      if (masks_[i] != nullptr) count_present(i, rows, masks_[i]);
    }
  }

  int64_t branches() const { return modalities_ + 1; }
  // Null where no row lacks the modality.
  const bool* present(int64_t modality) const { return masks_[modality]; }

  // Room for the row losses of the largest chunk.
  void start_chunk(int64_t first_row, int64_t rows) {
    first_row_ = first_row;
    row_losses_.resize(branches() * rows);
  }

  // A range of rows of the chunk: the loss, and the residuals in place of the logits.
  template <typename T>
  void add_rows(int64_t begin, int64_t end, int64_t classes, int64_t branch, bool residual,
                T* logits) {
    const bool* mask = branch > 0 ? masks_[branch - 1] : nullptr;
    const int64_t chunk = static_cast<int64_t>(row_losses_.size()) / branches();
    const LossRows<T> rows{target_ + first_row_,
                           options_.ignore_index,
                           mask != nullptr ? mask + first_row_ : nullptr,
                           options_.label_smoothing,
                           scale(branch),
                           residual,
                           row_losses_.data() + branch * chunk};
    correct_[branch].fetch_add(cross_entropy_rows<T>(begin, end, classes, rows, logits),
                               std::memory_order_relaxed);
  }

  // Sums over rows are taken in row order, however rows were spread over threads and chunks.
  void finish_chunk() {
    const int64_t chunk = static_cast<int64_t>(row_losses_.size()) / branches();
    for (int64_t branch = 0; branch < branches(); ++branch) {
      const double* losses = row_losses_.data() + branch * chunk;
      for (int64_t r = 0; r < chunk; ++r) sums_[branch] += losses[r];
    }
  }

  // total, losses, correct
  std::vector<Tensor> results(ScalarType dtype) const {
    std::vector<Tensor> results{empty_cpu({}, dtype), empty_cpu({branches()}, dtype),
                                empty_cpu({branches()}, ScalarType::Long)};
    int64_t* correct = static_cast<int64_t*>(results[2].data_ptr());
    dispatch_dtype(dtype, [&](auto type) {
      using T = decltype(type);
      double total = 0;
      for (int64_t branch = 0; branch < branches(); ++branch) {
        const double value = loss(branch);
        total += branch == 0 ? value : options_.alpha[branch - 1] * value;
        static_cast<T*>(results[1].data_ptr())[branch] = static_cast<T>(value);
        correct[branch] = correct_[branch].load(std::memory_order_relaxed);
      }
      *static_cast<T*>(results[0].data_ptr()) = static_cast<T>(total);
    });
    return results;
  }

 private:
  void count(const Checks& checks, int64_t rows, int64_t classes) {
    int64_t counted = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t value = target_[r];
      if (value == options_.ignore_index) continue;
      if (value < 0 || value >= classes) {
        checks.fail("target",
                    "class indices in [0, " + std::to_string(classes) + ") or ignore_index " +
                        std::to_string(options_.ignore_index),
                    std::to_string(value));
      }
      ++counted;
    }
    std::fill(counts_.begin(), counts_.end(), counted);
  }

  void count_present(int64_t modality, int64_t rows, const bool* present) {
    int64_t counted = 0;
    for (int64_t r = 0; r < rows; ++r) {
      counted += present[r] && target_[r] != options_.ignore_index;
    }
    counts_[modality + 1] = counted;
  }

  double scale(int64_t branch) const {
    const double weight = branch == 0 ? 1 : options_.alpha[branch - 1];
    return options_.mean ? weight / counts_[branch] : weight;
  }

  double loss(int64_t branch) const {
    if (!options_.mean) return sums_[branch];
    if (counts_[0] == 0) return std::numeric_limits<double>::quiet_NaN();  // as PyTorch has it
    return counts_[branch] == 0 ? 0 : sums_[branch] / counts_[branch];
  }

  LossOptions options_;
  int64_t modalities_;
  std::vector<Tensor> held_;
  const int64_t* target_;
  Masks masks_;
  std::vector<int64_t> counts_;  // rows that count
  std::vector<double> sums_;
  std::vector<std::atomic<int64_t>> correct_;
  std::vector<double> row_losses_;
  int64_t first_row_ = 0;
};

// A step's results: the losses', then the gradients in the dtype they have.
inline std::vector<Tensor> with_gradients(std::vector<Tensor> results, std::vector<Tensor> grads,
                                          ScalarType storage) {
  for (Tensor& grad : grads) results.push_back(to_dtype(grad, gradient_dtype(storage)));
  return results;
}

// The op of one head. `Op` has its name, what parses its arguments, and the class that does it.
template <class Op>
std::vector<Tensor> step(std::vector<Tensor> features, std::vector<Tensor> weights,
                         OptionalTensors biases, Tensor target, OptionalTensors present,
                         std::vector<double> alpha, bool mean, int64_t ignore_index,
                         double label_smoothing, std::vector<bool> needs_features,
                         std::vector<bool> needs_weights, std::vector<bool> needs_biases,
                         double encoder_leak, double head_leak, int64_t workspace_limit,
                         bool /* allow_tf32 */, int64_t executor) {
  const Checks checks(Op::kName);
  checks.executor(executor);
  const auto head = Op::kParse(checks, features, weights);
  checks.biases(biases, weights, features[0]);
  checks.step(target, present, alpha, label_smoothing, workspace_limit, features.size(),
              head.leading, features[0]);
  const Needs needs{needs_features, needs_weights, needs_biases};
  checks.needs(needs, encoder_leak, head_leak, features.size(), weights.size());
  if (workspace_limit == 0) workspace_limit = kDefaultWorkspace;
  BranchLosses losses(checks, head.rows, head.classes, target, present,
                      {alpha, mean, ignore_index, label_smoothing});
  std::vector<Tensor> grads;
  dispatch_dtype(head.compute, [&](auto type) {
    typename Op::template Step<decltype(type)> step(head, biases, needs, losses, encoder_leak,
                                                    head_leak, workspace_limit);
    grads = step.run(features, weights);
  });
  return with_gradients(losses.results(head.compute), std::move(grads), head.storage);
}

}  // namespace dgl_ext::cpu
