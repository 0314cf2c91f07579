// What every kernel shares: element types, launching with programmatic dependent launch, a few device helpers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels.h"

namespace nanopd {

// ---------------------------------------------------------------------------------------------- element types

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// Calls `function(T{})` with the C++ type that `dtype` names.
template <typename Function>
cudaError_t dispatch(DType dtype, Function function) {
    switch (dtype) {
        case DType::f32: return function(float{});
        case DType::f16: return function(__half{});
        case DType::bf16: return function(__nv_bfloat16{});
    }
    return cudaErrorInvalidValue;
}

// Elements loaded and stored as one access: 16 bytes of them, unless told otherwise.
template <typename T, int size_ = 16 / sizeof(T)>
struct alignas(size_ * sizeof(T)) Pack {
    static constexpr int size = size_;
    T values[size];
};

// ------------------------------------------------------------------------------------ dependent kernel launches

// A kernel launched by `launch` may start while the one before it still runs (programmatic dependent launch, sm_90
// and newer). Before it reads what earlier kernels wrote, or writes anything at all, every thread calls
// `wait_for_previous()`; before that it may only read constants, such as weights. It calls `let_next_start()` as
// soon as the next kernel's prologue may take up room on the GPU. Every kernel must wait, also those with nothing to
// read, or completion would not be passed on along the chain. decode_attention reads more than constants early, and counts
// on embed and itself letting the next start only after their wait.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// The compute capability of the current device, 90 for 9.0; asked for once per device.
int compute_capability();
int multiprocessor_count();

// With thread blocks in clusters of `cluster` along x, which only sm_90 and newer have.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_clusters(void (*kernel)(Parameters...), int cluster, dim3 grid, dim3 block, size_t shared_bytes,
                            cudaStream_t stream, Arguments&&... arguments) {
    cudaLaunchAttribute attributes[2]{};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = compute_capability() < 90 ? 0 : cluster == 1 ? 1 : 2;
    return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Arguments&&... arguments) {
    return launch_clusters(kernel, 1, grid, block, shared_bytes, stream, arguments...);
}

// ------------------------------------------------------------------------------------------------- reductions

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
    return value;
}

}  // namespace nanopd
