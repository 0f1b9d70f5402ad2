// What the steps of all heads share on the CPU: the target, the losses, how many rows the workspace
// holds, and the op.

#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "cpu/cross_entropy.h"
#include "cpu/head.h"

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

// Soft targets as the rows' pass reads them, in their own dtype.
template <typename T, typename Stored>
void read_shares(const void* data, int64_t first, int64_t stride, int64_t count, T* to) {
  const Stored* from = static_cast<const Stored*>(data) + first;
  for (int64_t c = 0; c < count; ++c) to[c] = static_cast<T>(from[c * stride]);
}
template <typename T>
auto reader_of(ScalarType stored) {
  switch (stored) {
    case ScalarType::Double:
      return read_shares<T, double>;
    case ScalarType::Float:
      return read_shares<T, float>;
    case ScalarType::BFloat16:
      return read_shares<T, torch::headeronly::BFloat16>;
    default:
      return read_shares<T, torch::headeronly::Half>;
  }
}

// The losses of one step: the fused branch first, then one per modality. Everything that a residual
// is scaled with is known before the first logit: the constructor reads all targets and weights.
class BranchLosses {
 public:
  BranchLosses(const Checks& checks, const HeadSizes& sizes, ScalarType dtype,
               const StepInputs& inputs, const Masks& masks, const LossOptions& options)
      : options_(options),
        modalities_(static_cast<int64_t>(options.alpha.size())),
        rows_(sizes.rows),
        classes_(sizes.classes),
        dtype_(dtype),
        masks_(masks),
        counted_(branches(), 0),
        divisors_(branches(), 0.0),
        correct_(branches()) {
    if (inputs.target.scalar_type() == ScalarType::Long) {
      target_ = flat_data<int64_t>(inputs.target, held_);
    } else {
      soft_ = single_row_stride(inputs.target) ? inputs.target : to_contiguous(inputs.target);
    }
    losses_ = empty_per_row(sizes, dtype);
    predictions_ = empty_per_row(sizes, ScalarType::Long);
    dispatch_dtype(dtype, [&](auto type) {
      using T = decltype(type);
      if (inputs.class_weight) class_weight_ = flat_data<T>(*inputs.class_weight, held_);
      if (inputs.sample_weight) sample_weight_ = flat_data<T>(*inputs.sample_weight, held_);
      count<T>(checks);
    });
  }

  int64_t branches() const { return modalities_ + 1; }

  void start_chunk(int64_t first_row) { first_row_ = first_row; }

  // A range of rows of the chunk: the loss, and the residuals in place of the logits.
  template <typename T>
  void add_rows(int64_t begin, int64_t end, int64_t branch, bool residual, T* logits) {
    const bool* mask = mask_of(branch);
    const int64_t first = branch * rows_ + first_row_;
    LossRows<T> rows{target_ ? target_ + first_row_ : nullptr,
                     {},
                     static_cast<const T*>(class_weight_),
                     sample_weight_ ? static_cast<const T*>(sample_weight_) + first_row_ : nullptr,
                     options_.ignore_index,
                     mask != nullptr ? mask + first_row_ : nullptr,
                     options_.label_smoothing,
                     scale(branch),
                     residual,
                     static_cast<T*>(losses_.data_ptr()) + first,
                     static_cast<int64_t*>(predictions_.data_ptr()) + first};
    if (soft_) {
      const int64_t row_stride = *single_row_stride(*soft_);
      const int64_t skipped = first_row_ * row_stride * soft_->element_size();
      rows.soft = {static_cast<const char*>(soft_->const_data_ptr()) + skipped, row_stride,
                   soft_->stride(soft_->dim() - 1), reader_of<T>(soft_->scalar_type())};
    }
    correct_[branch].fetch_add(cross_entropy_rows<T>(begin, end, classes_, rows, logits),
                               std::memory_order_relaxed);
  }

  // total, branch losses, correct, counted, losses, predictions
  std::vector<Tensor> results() const {
    std::vector<Tensor> results{empty_cpu({}, dtype_), empty_cpu({branches()}, dtype_),
                                empty_cpu({branches()}, ScalarType::Long),
                                empty_cpu({branches()}, ScalarType::Long)};
    int64_t* correct = static_cast<int64_t*>(results[2].data_ptr());
    std::copy(counted_.begin(), counted_.end(), static_cast<int64_t*>(results[3].data_ptr()));
    dispatch_dtype(dtype_, [&](auto type) {
      using T = decltype(type);
      double total = 0;
      for (int64_t branch = 0; branch < branches(); ++branch) {
        const double value = loss<T>(branch);
        total += branch == 0 ? value : options_.alpha[branch - 1] * value;
        static_cast<T*>(results[1].data_ptr())[branch] = static_cast<T>(value);
        correct[branch] = correct_[branch].load(std::memory_order_relaxed);
      }
      *static_cast<T*>(results[0].data_ptr()) = static_cast<T>(total);
    });
    results.push_back(losses_);
    results.push_back(predictions_);
    return results;
  }

 private:
  Tensor empty_per_row(const HeadSizes& sizes, ScalarType dtype) const {
    Shape shape = sizes.leading;
    shape.insert(shape.begin(), branches());
    return empty_cpu(shape, dtype);
  }

  // Which rows count, and what their weights sum up to; a bad target or weight is an error.
  template <typename T>
  void count(const Checks& checks) {
    const T* class_weight = static_cast<const T*>(class_weight_);
    const T* sample_weight = static_cast<const T*>(sample_weight_);
    const auto check = [&](const char* name, const T* weights, int64_t size) {
      for (int64_t k = 0; weights != nullptr && k < size; ++k) {
        if (!(weights[k] >= 0 && std::isfinite(weights[k])))
          checks.fail(name, "finite weights, 0 or more", std::to_string(weights[k]));
      }
    };
    check("class_weight", class_weight, classes_);
    check("sample_weight", sample_weight, rows_);
    for (int64_t r = 0; target_ != nullptr && r < rows_; ++r) {
      if (has_label(r) && (target_[r] < 0 || target_[r] >= classes_)) {
        checks.fail("target",
                    "class indices in [0, " + std::to_string(classes_) + ") or ignore_index " +
                        std::to_string(options_.ignore_index),
                    std::to_string(target_[r]));
      }
    }
    for (int64_t branch = 0; branch < branches(); ++branch) {
      const bool* mask = mask_of(branch);
      if (branch > 0 && mask == nullptr) {
        counted_[branch] = counted_[0];
        divisors_[branch] = divisors_[0];
        continue;
      }
      for (int64_t r = 0; r < rows_; ++r) {
        if (!has_label(r) || (mask != nullptr && !mask[r])) continue;
        double weight = 1;
        if (sample_weight != nullptr) weight = sample_weight[r];
        if (class_weight != nullptr && target_ != nullptr) weight *= class_weight[target_[r]];
        ++counted_[branch];
        divisors_[branch] += weight;
      }
    }
  }
  bool has_label(int64_t r) const {
    return target_ == nullptr || target_[r] != options_.ignore_index;
  }
  const bool* mask_of(int64_t branch) const { return branch > 0 ? masks_[branch - 1] : nullptr; }

  double scale(int64_t branch) const {
    const double alpha = branch == 0 ? 1 : options_.alpha[branch - 1];
    if (!options_.mean) return alpha;
    return divisors_[branch] > 0 ? alpha / divisors_[branch] : 0;
  }

  // Summed in row order, however rows were spread over threads and chunks.
  template <typename T>
  double loss(int64_t branch) const {
    const T* losses = static_cast<const T*>(losses_.const_data_ptr()) + branch * rows_;
    const T* weights = static_cast<const T*>(sample_weight_);
    double sum = 0;
    for (int64_t r = 0; r < rows_; ++r) {
      sum += weights != nullptr ? static_cast<double>(weights[r]) * losses[r] : losses[r];
    }
    if (!options_.mean) return sum;
    if (divisors_[0] == 0) return std::numeric_limits<double>::quiet_NaN();  // as PyTorch has it
    return divisors_[branch] == 0 ? 0 : sum / divisors_[branch];
  }

  LossOptions options_;
  int64_t modalities_, rows_, classes_;
  ScalarType dtype_;  // of losses and weights
  std::vector<Tensor> held_;
  const int64_t* target_ = nullptr;  // null: soft targets
  std::optional<Tensor> soft_;
  const void* class_weight_ = nullptr;
  const void* sample_weight_ = nullptr;
  const Masks& masks_;
  std::vector<int64_t> counted_;
  std::vector<double> divisors_;  // of the means
  std::vector<std::atomic<int64_t>> correct_;
  Tensor losses_;       // (branches, ...)
  Tensor predictions_;  // (branches, ...)
  int64_t first_row_ = 0;
};

// A step's results: the losses', then the gradients in the dtype they have.
inline std::vector<Tensor> with_gradients(std::vector<Tensor> results, std::vector<Tensor> grads,
                                          ScalarType storage) {
  for (Tensor& grad : grads) results.push_back(to_dtype(grad, gradient_dtype(storage)));
  return results;
}

// The op of one head that trains it; see `forward`.
template <class Head>
std::vector<Tensor> step(std::vector<Tensor> features, std::vector<Tensor> weights,
                         OptionalTensors biases, Tensor target, std::optional<Tensor> class_weight,
                         std::optional<Tensor> sample_weight, OptionalTensors present,
                         std::vector<double> alpha, bool mean, int64_t ignore_index,
                         double label_smoothing, std::vector<bool> needs_features,
                         std::vector<bool> needs_weights, std::vector<bool> needs_biases,
                         double encoder_leak, double head_leak, int64_t workspace_limit,
                         bool /* allow_tf32 */, int64_t executor) {
  const Checks checks(Head::kStep);
  checks.executor(executor);
  const auto sizes = (checks.*Head::kSizes)(features, weights);
  checks.biases(biases, weights, features[0]);
  const StepInputs inputs{target, class_weight, sample_weight};
  checks.step(inputs, present, alpha, label_smoothing, workspace_limit, features.size(), sizes,
              features[0]);
  const Needs needs{needs_features, needs_weights, needs_biases};
  checks.needs(needs, encoder_leak, head_leak, features.size(), weights.size());
  if (workspace_limit == 0) workspace_limit = kDefaultWorkspace;
  const auto head = as_matrices(sizes, features, weights, present);
  BranchLosses losses(checks, sizes, head.compute, inputs, head.masks,
                      {alpha, mean, ignore_index, label_smoothing});
  auto grads = dispatch_dtype(head.compute, [&](auto type) {
    return typename Head::template Call<decltype(type)>(head, biases)
        .step(losses, needs, {encoder_leak, head_leak}, workspace_limit);
  });
  return with_gradients(losses.results(), std::move(grads), head.storage);
}

}  // namespace dgl_ext::cpu
