// The torch-free row passes with numpy arrays, for tests/cpu/test_core.py. Arrays may have any
// strides where the passes take strides; the module is built by CMake and is not packaged.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <vector>

#include "cpu/cross_entropy.h"
#include "cpu/matmul.h"
#include "cpu/row_passes.h"

namespace py = pybind11;

namespace {

using dgl_ext::Isa;

template <typename T>
using Array = py::array_t<T, py::array::forcecast>;

// A range of rows or columns, as the threads of the package get them.
using Range = std::pair<int64_t, int64_t>;

template <typename T>
dgl_ext::Strided<T> strided(const Array<T>& array) {
  constexpr auto size = static_cast<int64_t>(sizeof(T));
  return {array.data(), array.strides(0) / size, array.strides(1) / size};
}

template <typename T>
const T* data_or_null(const std::optional<Array<T>>& array) {
  return array ? array->data() : nullptr;
}

template <typename T>
std::vector<dgl_ext::Term<T>> terms(const std::vector<std::pair<Array<T>, T>>& pairs) {
  std::vector<dgl_ext::Term<T>> result;
  for (const auto& [values, scale] : pairs) result.push_back({strided(values), scale});
  return result;
}

template <typename T>
void bind(py::module_& m) {
  m.def("add_bias", [](const Array<T>& in, const Array<T>& bias, Array<T>& out, Range rows) {
    dgl_ext::add_bias<T>(rows.first, rows.second, in.shape(1), strided(in), bias.data(),
                         out.mutable_data());
  });
  m.def("combine_logits",
        [](const std::vector<Array<T>>& partials, const std::vector<Array<T>>& biases,
           std::vector<Array<T>>& logits, const Array<T>& fused_bias, Array<T>& fused, Range rows) {
          std::vector<dgl_ext::LogitsBranch<T>> branches;
          for (size_t i = 0; i < partials.size(); ++i) {
            branches.push_back({strided(partials[i]), biases[i].data(), logits[i].mutable_data()});
          }
          dgl_ext::combine_logits<T>(rows.first, rows.second, fused.shape(1), branches.data(),
                                     branches.size(), fused_bias.data(), fused.mutable_data());
        });
  m.def("mix", [](const std::vector<std::pair<Array<T>, T>>& pairs, Array<T>& out, Range rows) {
    const auto list = terms<T>(pairs);
    dgl_ext::mix<T>(rows.first, rows.second, out.shape(1), list.data(), list.size(),
                    out.mutable_data());
  });
  m.def("column_sums", [](const std::vector<std::pair<Array<T>, T>>& pairs, int64_t row_count,
                          Array<T>& out, Range columns) {
    const auto list = terms<T>(pairs);
    std::vector<double> totals(columns.second, 0.0);
    dgl_ext::add_column_sums<T>(columns.first, columns.second, row_count, list.data(), list.size(),
                                totals.data());
    std::copy(totals.begin() + columns.first, totals.end(), out.mutable_data() + columns.first);
  });
  m.def("film_hidden", [](const Array<T>& film, const Array<T>& y, const Array<T>& bias,
                          std::optional<Array<T>> fused, std::optional<Array<T>> of_x,
                          std::optional<Array<T>> of_y, Range rows) {
    dgl_ext::film_hidden<T>(
        rows.first, rows.second, y.shape(1), film.data(), strided(y), bias.data(),
        {fused ? fused->mutable_data() : nullptr, of_x ? of_x->mutable_data() : nullptr,
         of_y ? of_y->mutable_data() : nullptr});
  });
  m.def("film_grad",
        [](const std::optional<Array<T>>& d, T scale, const std::optional<Array<T>>& d_x, T scale_x,
           const Array<T>& y, Array<T>& out, Range rows) {
          dgl_ext::film_grad<T>(rows.first, rows.second, y.shape(1), data_or_null(d), scale,
                                data_or_null(d_x), scale_x, strided(y), out.mutable_data());
        });
  m.def("film_grad_target", [](const std::optional<Array<T>>& d, T scale, const Array<T>& film,
                               const std::optional<Array<T>>& d_y, const Array<T>& bias,
                               Array<T>& out, Range rows) {
    dgl_ext::film_grad_target<T>(rows.first, rows.second, out.shape(1), data_or_null(d), scale,
                                 film.data(), data_or_null(d_y), bias.data(), out.mutable_data());
  });
}

// Every compilation of the products; the package takes the best that the processor has.
template <typename T>
void bind_gemm(py::module_& m) {
  m.def("matmul_dots",
        [](const Array<T>& x, const Array<T>& w, Array<T>& out, Range rows, Isa isa) {
          dgl_ext::matmul_bodies::dots_for<T>(isa)(rows.first, rows.second, w.shape(0), x.shape(1),
                                                   strided(x), strided(w), out.mutable_data());
        });
  m.def("matmul_packed", [](const Array<T>& a, const Array<T>& b, Array<T>& out, Range rows,
                            Range columns, Isa isa, bool add) {
    const dgl_ext::Strided<T> to = strided(out);
    dgl_ext::matmul_bodies::product_for<T>(isa)(
        rows.first, rows.second, columns.first, columns.second, a.shape(1), strided(a), strided(b),
        {out.mutable_data(), to.row_stride, to.col_stride, add});
  });
}

template <typename T>
void read_shares(const void* data, int64_t first, int64_t stride, int64_t count, T* to) {
  const T* from = static_cast<const T*>(data) + first;
  for (int64_t c = 0; c < count; ++c) to[c] = from[c * stride];
}

// One branch's losses and residuals, in every compilation; the residuals replace the logits.
template <typename T>
void bind_cross_entropy(py::module_& m) {
  m.def("cross_entropy_rows",
        [](Array<T>& logits, const std::optional<Array<int64_t>>& target,
           const std::optional<Array<T>>& shares, const std::optional<Array<T>>& class_weight,
           const std::optional<Array<T>>& sample_weight, int64_t ignore_index,
           const std::optional<Array<bool>>& present, double label_smoothing, double scale,
           bool residual, Array<T>& losses, Array<int64_t>& predictions, Range rows, Isa isa) {
          dgl_ext::SoftTarget<T> soft;
          if (shares) {
            const dgl_ext::Strided<T> from = strided(*shares);
            soft = {from.data, from.row_stride, from.col_stride, read_shares<T>};
          }
          return dgl_ext::cross_entropy::rows_for<T>(isa)(
              rows.first, rows.second, logits.shape(1),
              {data_or_null(target), soft, data_or_null(class_weight), data_or_null(sample_weight),
               ignore_index, data_or_null(present), label_smoothing, scale, residual,
               losses.mutable_data(), predictions.mutable_data()},
              logits.mutable_data());
        });
}

}  // namespace

PYBIND11_MODULE(dgl_core, m) {
  py::enum_<Isa>(m, "Isa")
      .value("portable", Isa::kPortable)
      .value("avx2", Isa::kAvx2)
      .value("avx512", Isa::kAvx512);
  m.def("isa", &dgl_ext::isa);
  py::module_ f32 = m.def_submodule("float32");
  py::module_ f64 = m.def_submodule("float64");
  bind<float>(f32);
  bind<double>(f64);
  bind_gemm<float>(f32);
  bind_gemm<double>(f64);
  bind_cross_entropy<float>(f32);
  bind_cross_entropy<double>(f64);
}
