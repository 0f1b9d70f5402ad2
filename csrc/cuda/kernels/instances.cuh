// Which kernels are built: the one list of dtype x tile x alignment. Unaligned operands and
// float64 run on the small tiles only: they have to be right, not fast.
#pragma once

#include "cuda/kernels/gemm_tile.cuh"

namespace dgl_ext {

template <class... Configs>
struct ConfigList {};

using Configs = ConfigList<Config<double, Tile::kFloat64, false>,       //
                           Config<float, Tile::kFloat32Small, false>,   //
                           Config<float, Tile::kFloat32Small, true>,    //
                           Config<float, Tile::kFloat32Medium, true>,   //
                           Config<float, Tile::kTFloat32Small, true>,   //
                           Config<float, Tile::kTFloat32Medium, true>,  //
                           Config<bf16, Tile::kHalfSmall, false>,       //
                           Config<bf16, Tile::kHalfSmall, true>,        //
                           Config<bf16, Tile::kHalfMedium, true>,       //
                           Config<f16, Tile::kHalfSmall, false>,        //
                           Config<f16, Tile::kHalfSmall, true>,         //
                           Config<f16, Tile::kHalfMedium, true>>;

/// For the kernels of the library executor, which have no tiles: one of each dtype.
using ElementConfigs =
    ConfigList<Config<double, Tile::kFloat64, false>, Config<float, Tile::kFloat32Small, false>,
               Config<bf16, Tile::kHalfSmall, false>, Config<f16, Tile::kHalfSmall, false>>;

template <class T>
constexpr Dtype kDtypeOf = std::is_same_v<T, double>  ? Dtype::kFloat64
                           : std::is_same_v<T, float> ? Dtype::kFloat32
                           : std::is_same_v<T, bf16>  ? Dtype::kBFloat16
                                                      : Dtype::kFloat16;

/// The one way from a function object to a kernel: Head<Config>::run as a __global__ function.
// Arguments come in constant memory, of which every driver gives 4 KiB.
template <template <class> class Head, class C>
__global__ void __launch_bounds__(C::kThreads, C::kShape.min_ctas)
    head_kernel(const __grid_constant__ typename Head<C>::Arguments args) {
  Head<C>::run(args);
}

/// Launches Head with the configuration that the plan names; cudaErrorNotSupported if it is not in
/// the list.
template <template <class> class Head, class Arguments, class... Configs>
cudaError_t launch_head(ConfigList<Configs...>, Dtype dtype, const LaunchShape& shape,
                        const Arguments& arguments, cudaStream_t stream) {
  cudaError_t status = cudaErrorNotSupported;
  const auto try_config = [&](auto config) {
    using C = decltype(config);
    static_assert(sizeof(Arguments) <= 4096, "kernel arguments");
    if (kDtypeOf<typename C::T> != dtype || C::kTile != shape.tile ||
        C::kAligned != shape.aligned) {
      return;
    }
    status = launch_kernel<Arguments>(&head_kernel<Head, C>, shape.grid, C::kThreads,
                                      Head<C>::kSharedBytes, shape.cooperative, arguments, stream);
  };
  (try_config(Configs{}), ...);
  return status;
}

/// Lowers ctas[tile] to what Head's kernels allow.
template <template <class> class Head, class... Configs>
cudaError_t lower_occupancy(ConfigList<Configs...>, int (&ctas)[kTileCount]) {
  cudaError_t status = cudaSuccess;
  const auto ask = [&](auto config) {
    using C = decltype(config);
    if (status != cudaSuccess) return;
    int here = 0;
    status = occupancy<typename Head<C>::Arguments>(&head_kernel<Head, C>, C::kThreads,
                                                    Head<C>::kSharedBytes, &here);
    int& least = ctas[static_cast<int>(C::kTile)];
    if (here < least) least = here;
  };
  (ask(Configs{}), ...);
  return status;
}

}  // namespace dgl_ext
