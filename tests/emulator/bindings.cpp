// The torch-free core for pytest: plans, guarded buffers, and the launchers on emulated CUDA.
// Problems are dicts of sizes and (address, stride) pairs, named as the structs in problem.h.
#include <pybind11/native_enum.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "common/problem.h"
#include "cuda/kernels/film_backward.cuh"
#include "cuda/kernels/film_forward.cuh"
#include "cuda/kernels/film_step.cuh"
#include "cuda/kernels/instances.cuh"
#include "cuda/kernels/linear_backward.cuh"
#include "cuda/kernels/linear_forward.cuh"
#include "cuda/kernels/linear_step.cuh"
#include "cuda/launchers/launch.h"
#include "cuda/plan/plan.h"
#include "machine.h"
#include "memory.h"

namespace py = pybind11;
using namespace dgl_ext;

namespace {

uintptr_t address_of(const py::dict& d, const char* key) {
  if (!d.contains(key) || d[key].is_none()) return 0;
  return d[key].cast<uintptr_t>();
}
template <class M>
M matrix_of(const py::handle& item) {
  M m;
  if (item.is_none()) return m;
  const auto pair = item.cast<std::pair<uintptr_t, int64_t>>();
  m.data = reinterpret_cast<void*>(pair.first);
  m.stride = pair.second;
  return m;
}
template <class M>
M matrix_of(const py::dict& d, const char* key) {
  return d.contains(key) ? matrix_of<M>(d[key]) : M{};
}
template <class M>
void matrices_of(const py::dict& d, const char* key, M* out) {
  if (!d.contains(key)) return;
  for (const py::handle& item : d[key]) *out++ = matrix_of<M>(item);
}
template <class P>
void pointers_of(const py::dict& d, const char* key, P** out) {
  if (!d.contains(key)) return;
  for (const py::handle& item : d[key]) {
    *out++ = item.is_none() ? nullptr : reinterpret_cast<P*>(item.cast<uintptr_t>());
  }
}

void read_present(const py::dict& d, const uint8_t** present) {
  if (!d.contains("present")) return;
  for (const py::handle& item : d["present"]) {
    *present++ = item.is_none() ? nullptr : reinterpret_cast<uint8_t*>(item.cast<uintptr_t>());
  }
}
void read(const py::dict& d, LinearHead& head) {
  head.rows = d["rows"].cast<int64_t>();
  head.classes = d["classes"].cast<int64_t>();
  const auto widths = d["width"].cast<std::vector<int64_t>>();
  head.modalities = int(widths.size());
  std::copy(widths.begin(), widths.end(), head.width);
  matrices_of(d, "feature", head.feature);
  matrices_of(d, "weight", head.weight);
  head.fused_bias = reinterpret_cast<void*>(address_of(d, "fused_bias"));
  pointers_of(d, "branch_bias", head.branch_bias);
  read_present(d, head.present);
}
void read(const py::dict& d, Leaks& leaks) {
  if (d.contains("encoder_leak")) leaks.encoder = d["encoder_leak"].cast<double>();
  if (d.contains("head_leak")) leaks.head = d["head_leak"].cast<double>();
}
void read(const py::dict& d, LinearHeadForward& p) {
  read(d, p.head);
  p.fused = matrix_of<Matrix>(d, "fused");
  matrices_of(d, "unimodal", p.unimodal);
}
void read(const py::dict& d, LinearHeadBackward& p) {
  read(d, p.head);
  read(d, p.leaks);
  p.grad_fused = matrix_of<ConstMatrix>(d, "grad_fused");
  matrices_of(d, "grad_unimodal", p.grad_unimodal);
  matrices_of(d, "grad_feature", p.grad_feature);
  matrices_of(d, "grad_weight", p.grad_weight);
  p.grad_fused_bias = reinterpret_cast<void*>(address_of(d, "grad_fused_bias"));
  pointers_of(d, "grad_branch_bias", p.grad_branch_bias);
}
void read(const py::dict& d, CrossEntropy& loss) {
  loss.target = reinterpret_cast<int64_t*>(address_of(d, "target_class"));
  if (d.contains("soft_target")) {
    loss.soft_target = matrix_of<ConstMatrix>(d, "soft_target");
    loss.soft_dtype = d["soft_dtype"].cast<Dtype>();
  }
  loss.class_weight = reinterpret_cast<void*>(address_of(d, "class_weight"));
  loss.sample_weight = reinterpret_cast<void*>(address_of(d, "sample_weight"));
  const auto alpha = d["alpha"].cast<std::vector<double>>();
  std::copy(alpha.begin(), alpha.end(), loss.alpha);
  loss.mean = d["mean"].cast<bool>();
  loss.ignore_index = d["ignore_index"].cast<int64_t>();
  loss.label_smoothing = d["label_smoothing"].cast<double>();
  loss.total = reinterpret_cast<void*>(address_of(d, "total"));
  loss.branch_losses = reinterpret_cast<void*>(address_of(d, "branch_losses"));
  loss.counted = reinterpret_cast<int64_t*>(address_of(d, "counted"));
  loss.losses = reinterpret_cast<void*>(address_of(d, "losses"));
  loss.predictions = reinterpret_cast<int64_t*>(address_of(d, "predictions"));
  loss.correct = reinterpret_cast<int64_t*>(address_of(d, "correct"));
}
void read(const py::dict& d, LinearHeadStep& p) {
  read(d, static_cast<LinearHeadBackward&>(p));
  read(d, p.loss);
}
void read(const py::dict& d, FilmHead& head) {
  head.rows = d["rows"].cast<int64_t>();
  head.condition_width = d["condition_width"].cast<int64_t>();
  head.hidden = d["hidden"].cast<int64_t>();
  head.classes = d["classes"].cast<int64_t>();
  head.condition = matrix_of<ConstMatrix>(d, "condition");
  head.target = matrix_of<ConstMatrix>(d, "target");
  head.film_weight = matrix_of<ConstMatrix>(d, "film_weight");
  head.out_weight = matrix_of<ConstMatrix>(d, "out_weight");
  head.film_bias = reinterpret_cast<void*>(address_of(d, "film_bias"));
  head.out_bias = reinterpret_cast<void*>(address_of(d, "out_bias"));
  read_present(d, head.present);
}
void read(const py::dict& d, FilmHeadForward& p) {
  read(d, p.head);
  p.fused = matrix_of<Matrix>(d, "fused");
  matrices_of(d, "unimodal", p.unimodal);
  p.modulation = matrix_of<Matrix>(d, "modulation");
}
void read(const py::dict& d, FilmHeadBackward& p) {
  read(d, p.head);
  read(d, p.leaks);
  p.modulation = matrix_of<ConstMatrix>(d, "modulation");
  p.grad_fused = matrix_of<ConstMatrix>(d, "grad_fused");
  matrices_of(d, "grad_unimodal", p.grad_unimodal);
  p.grad_condition = matrix_of<Matrix>(d, "grad_condition");
  p.grad_target = matrix_of<Matrix>(d, "grad_target");
  p.grad_film_weight = matrix_of<Matrix>(d, "grad_film_weight");
  p.grad_out_weight = matrix_of<Matrix>(d, "grad_out_weight");
  p.grad_film_bias = reinterpret_cast<void*>(address_of(d, "grad_film_bias"));
  p.grad_out_bias = reinterpret_cast<void*>(address_of(d, "grad_out_bias"));
}
void read(const py::dict& d, FilmHeadStep& p) {
  read(d, static_cast<FilmHeadBackward&>(p));
  read(d, p.loss);
}
template <class Problem>
Problem read(const py::dict& d) {
  Problem p;
  read(d, p);
  return p;
}

/// plan_<head>(problem, precision, device, request) and <head>(problem, precision, plan, workspace)
template <class Problem, class Plan>
void bind_head(py::module_& m, const char* name,
               Plan (*plan)(const Problem&, Precision, const Device&, const PlanRequest&),
               cudaError_t (*launch)(const Problem&, Precision, const Plan&, void*, const Queue&)) {
  m.def((std::string("plan_") + name).c_str(),
        [plan](const py::dict& problem, Precision precision, const Device& device,
               const PlanRequest& request) {
          return plan(read<Problem>(problem), precision, device, request);
        },
        py::arg("problem"), py::arg("precision"), py::arg("device"),
        py::arg("request") = PlanRequest{});
  m.def(name, [launch](const py::dict& problem, Precision precision, const Plan& plan,
                       uintptr_t workspace) {
    return int(launch(read<Problem>(problem), precision, plan, reinterpret_cast<void*>(workspace),
                      Queue{}));
  });
}

/// The same for a training step, whose plan also takes the workspace limit.
template <class Problem, class Plan>
void bind_step(py::module_& m, const char* name,
               Plan (*plan)(const Problem&, Precision, const Device&, WorkspaceLimit,
                            const PlanRequest&),
               cudaError_t (*launch)(const Problem&, Precision, const Plan&, void*, const Queue&)) {
  m.def((std::string("plan_") + name).c_str(),
        [plan](const py::dict& problem, Precision precision, const Device& device,
               const PlanRequest& request) {
          const auto limit = workspace_limit(problem["workspace_limit"].cast<int64_t>());
          return plan(read<Problem>(problem), precision, device, limit, request);
        },
        py::arg("problem"), py::arg("precision"), py::arg("device"),
        py::arg("request") = PlanRequest{});
  m.def(name, [launch](const py::dict& problem, Precision precision, const Plan& plan,
                       uintptr_t workspace) {
    return int(launch(read<Problem>(problem), precision, plan, reinterpret_cast<void*>(workspace),
                      Queue{}));
  });
}

template <class T, size_t N>
std::vector<T> list_of(const T (&array)[N]) {
  return std::vector<T>(array, array + N);
}

/// Adds {(dtype, tile, aligned): (dynamic shared bytes, CTAs meant for one multiprocessor)}.
template <template <class> class Head, class... Configs>
void add_kernels(py::dict& all, const char* name, ConfigList<Configs...>) {
  py::dict kernels;
  const auto add = [&](auto config) {
    using C = decltype(config);
    const auto key = py::make_tuple(kDtypeOf<typename C::T>, C::kTile, C::kAligned);
    kernels[key] = py::make_tuple(Head<C>::kSharedBytes, C::kShape.min_ctas);
  };
  (add(Configs{}), ...);
  all[name] = kernels;
}

void bind_plans(py::module_& m) {
  py::native_enum<Dtype>(m, "Dtype", "enum.Enum")
      .value("float64", Dtype::kFloat64)
      .value("float32", Dtype::kFloat32)
      .value("bfloat16", Dtype::kBFloat16)
      .value("float16", Dtype::kFloat16)
      .finalize();
  py::native_enum<Tile>(m, "Tile", "enum.Enum")
      .value("float64", Tile::kFloat64)
      .value("float32_small", Tile::kFloat32Small)
      .value("float32_medium", Tile::kFloat32Medium)
      .value("tf32_small", Tile::kTFloat32Small)
      .value("tf32_medium", Tile::kTFloat32Medium)
      .value("half_small", Tile::kHalfSmall)
      .value("half_medium", Tile::kHalfMedium)
      .finalize();
  py::native_enum<Executor>(m, "Executor", "enum.Enum")
      .value("fused", Executor::kFused)
      .value("library", Executor::kLibrary)
      .value("none", Executor::kNone)
      .finalize();
  m.attr("tile_count") = kTileCount;
  py::class_<Precision>(m, "Precision")
      .def(py::init([](Dtype dtype, bool tf32) { return Precision{dtype, tf32}; }),
           py::arg("dtype"), py::arg("allow_tf32") = false);
  py::class_<Device>(m, "Device")
      .def(py::init([](int multiprocessors, int capability, std::vector<int> resident, int max) {
             Device d;
             d.multiprocessors = multiprocessors;
             d.capability = capability;
             std::copy_n(resident.begin(), kTileCount, d.resident_ctas);
             d.max_ctas = max;
             return d;
           }),
           py::arg("multiprocessors"), py::arg("capability") = 90,
           py::arg("resident_ctas") = std::vector<int>(kTileCount, 1), py::arg("max_ctas") = 0);
  py::class_<PlanRequest>(m, "PlanRequest")
      .def(py::init([](const py::object& executor, const py::object& tile, int64_t splits) {
             PlanRequest r;
             if (!executor.is_none()) r.executor = executor.cast<Executor>();
             if (!tile.is_none()) r.tile = tile.cast<Tile>();
             r.splits = splits;
             return r;
           }),
           py::arg("executor") = py::none(), py::arg("tile") = py::none(), py::arg("splits") = 0);
  py::class_<LaunchShape>(m, "LaunchShape")
      .def_readonly("executor", &LaunchShape::executor)
      .def_readonly("tile", &LaunchShape::tile)
      .def_readonly("aligned", &LaunchShape::aligned)
      .def_readonly("cooperative", &LaunchShape::cooperative)
      .def_readonly("grid", &LaunchShape::grid)
      .def_readonly("workspace_bytes", &LaunchShape::workspace_bytes);
  py::class_<LinearForwardPlan>(m, "LinearForwardPlan")
      .def_readonly("launch", &LinearForwardPlan::launch)
      .def_readonly("direct", &LinearForwardPlan::direct)
      .def_property_readonly("splits", [](const LinearForwardPlan& p) { return list_of(p.splits); })
      .def_readonly("split_depth", &LinearForwardPlan::split_depth);
  py::class_<LinearBackwardPlan>(m, "LinearBackwardPlan")
      .def_readonly("launch", &LinearBackwardPlan::launch)
      .def_readonly("plane_count", &LinearBackwardPlan::plane_count)
      .def_readonly("row_splits", &LinearBackwardPlan::row_splits)
      .def_readonly("partials", &LinearBackwardPlan::partials)
      .def_readonly("rows_per_split", &LinearBackwardPlan::rows_per_split);
  py::class_<StepPlan>(m, "StepPlan")
      .def_readonly("gradients", &StepPlan::gradients)
      .def_readonly("mixed", &StepPlan::mixed)
      .def_readonly("chunk_rows", &StepPlan::chunk_rows)
      .def_readonly("plane_count", &StepPlan::plane_count);
  py::class_<LinearStepPlan>(m, "LinearStepPlan")
      .def_readonly("launch", &LinearStepPlan::launch)
      .def_readonly("step", &LinearStepPlan::step)
      .def_readonly("forward", &LinearStepPlan::forward)
      .def_readonly("backward", &LinearStepPlan::backward);
  py::class_<FilmForwardPlan>(m, "FilmForwardPlan")
      .def_readonly("launch", &FilmForwardPlan::launch)
      .def_readonly("film_splits", &FilmForwardPlan::film_splits)
      .def_readonly("head_splits", &FilmForwardPlan::head_splits);
  py::class_<FilmBackwardPlan>(m, "FilmBackwardPlan")
      .def_readonly("launch", &FilmBackwardPlan::launch)
      .def_property_readonly("need_branch",
                             [](const FilmBackwardPlan& p) { return list_of(p.need_branch); })
      .def_readonly("copy_gradients", &FilmBackwardPlan::copy_gradients)
      .def_readonly("row_splits", &FilmBackwardPlan::row_splits)
      .def_readonly("rows_per_split", &FilmBackwardPlan::rows_per_split)
      .def_readonly("partials", &FilmBackwardPlan::partials)
      .def_readonly("out_splits", &FilmBackwardPlan::out_splits)
      .def_readonly("out_rows_per_split", &FilmBackwardPlan::out_rows_per_split);
  py::class_<FilmStepPlan>(m, "FilmStepPlan")
      .def_readonly("launch", &FilmStepPlan::launch)
      .def_readonly("step", &FilmStepPlan::step)
      .def_readonly("forward", &FilmStepPlan::forward)
      .def_readonly("backward", &FilmStepPlan::backward);
}

void bind_emulator(py::module_& m) {
  using emulator::Buffer;
  py::register_exception<emulator::Error>(m, "EmulatorError", PyExc_RuntimeError);
  py::class_<Buffer>(m, "Buffer")
      .def(py::init<std::string, size_t, size_t, bool, bool>(), py::arg("name"), py::arg("bytes"),
           py::arg("alignment"), py::arg("at_end"), py::arg("initialised"))
      .def_property_readonly("address",
                             [](const Buffer& b) { return reinterpret_cast<uintptr_t>(b.data()); })
      .def_property_readonly("bytes",  // a writable view, alive as long as the buffer
                             [](py::object self) {
                               const Buffer& b = self.cast<const Buffer&>();
                               return py::array_t<uint8_t>(b.size(),
                                                           static_cast<uint8_t*>(b.data()), self);
                             })
      .def_property_readonly("sparse", &Buffer::sparse)
      .def("slack_intact", &Buffer::slack_intact);
  m.attr("policies") = std::vector<std::string>{"linear", "reverse", "random", "priorities"};
  m.attr("deliveries") = std::vector<std::string>{"late", "early", "random"};
  m.def(
      "configure",
      [](uint64_t seed, int policy, int delivery, bool detect_races) {
        emulator::options() = {seed, emulator::Policy(policy), emulator::Delivery(delivery),
                               detect_races};
      },
      py::arg("seed"), py::arg("policy"), py::arg("delivery"), py::arg("detect_races"));
  m.def("watch", [](uintptr_t address, size_t bytes) {
    emulator::watch(reinterpret_cast<void*>(address), bytes);
  });
  m.def("statistics", [] {
    const emulator::Statistics& s = emulator::statistics();
    py::dict d;
    d["switches"] = s.switches;
    d["barriers"] = s.barriers;
    d["grid_syncs"] = s.grid_syncs;
    d["warp_operations"] = s.warp_operations;
    d["copies"] = s.copies;
    d["accesses"] = s.accesses;
    d["launches"] = s.launches;
    d["matmuls"] = s.matmuls;
    d["watched_reads"] = s.watched_reads;
    d["shared_bytes"] = s.shared_bytes;
    return d;
  });
  m.def("kernels", [] {
    py::dict all;
    add_kernels<LinearForward>(all, "LinearForward", Configs{});
    add_kernels<LinearBackward>(all, "LinearBackward", Configs{});
    add_kernels<LinearStep>(all, "LinearStep", Configs{});
    add_kernels<FilmForward>(all, "FilmForward", Configs{});
    add_kernels<FilmBackward>(all, "FilmBackward", Configs{});
    add_kernels<FilmStep>(all, "FilmStep", Configs{});
    return all;
  });
}

}  // namespace

PYBIND11_MODULE(emulated_kernels, m) {
  m.doc() = "dgl_ext's plans and CUDA kernels, run on the CPU by an emulator";
  bind_plans(m);
  bind_emulator(m);
  bind_head<LinearHeadForward>(m, "linear_head_forward", plan_linear_forward, linear_head_forward);
  bind_head<LinearHeadBackward>(m, "linear_head_backward", plan_linear_backward,
                                linear_head_backward);
  bind_step<LinearHeadStep>(m, "linear_head_step", plan_linear_step, linear_head_step);
  bind_head<FilmHeadForward>(m, "film_head_forward", plan_film_forward, film_head_forward);
  bind_head<FilmHeadBackward>(m, "film_head_backward", plan_film_backward, film_head_backward);
  m.def("scale_gradients",
        [](const std::vector<uintptr_t>& from, const std::vector<uintptr_t>& to,
           const std::vector<int64_t>& sizes, uintptr_t scale, Dtype dtype, bool to_float16) {
          ScaledGradients p;
          p.count = int(from.size());
          for (int i = 0; i < p.count; ++i) {
            p.from[i] = reinterpret_cast<void*>(from[i]);
            p.to[i] = reinterpret_cast<void*>(to[i]);
            p.size[i] = sizes[i];
          }
          p.scale = reinterpret_cast<void*>(scale);
          p.dtype = dtype;
          p.to_float16 = to_float16;
          Device device;
          device.multiprocessors = 1;
          return int(scale_gradients(p, device, nullptr));
        });
  bind_step<FilmHeadStep>(m, "film_head_step", plan_film_step, film_head_step);
}
