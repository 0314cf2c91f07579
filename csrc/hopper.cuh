// Hopper's own machinery for the kernels of `linear`: mbarriers, the tensor memory accelerator, its maps of matrices.
#pragma once

#include <cuda.h>

#include "common.cuh"

namespace nanopd {

// Shared memory for a block, such that two kernels' blocks fit a multiprocessor: this one's, and the next one's with its
// weights. Of two such kernels in a row one takes the larger part, more than half, so that none of its blocks can share
// a multiprocessor with another of its own, nor then can the other's: who shares one has half the memory's attention,
// and all wait for the last.
constexpr int kLargerBudget = 119 * 1024, kSmallerBudget = 106 * 1024;

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

// Makes initialised barriers known to TMA; the block's other threads learn of them by __syncthreads.
__device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// The box of `map` at these coordinates to shared memory; its bytes are counted at `full`.
__device__ __forceinline__ void load_box(void* target, const CUtensorMap* map, int at0, int at1, int at2,
                                         uint64_t* full, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(shared_address(target)),
        "l"(map), "r"(at0), "r"(at1), "r"(at2), "r"(shared_address(full)), "l"(policy)
        : "memory");
}

__device__ __forceinline__ uint64_t read_once_policy() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ uint64_t read_often_policy() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// How TMA sees a matrix of 2-byte elements: its sizes, the bytes from one index to the next for all but the first, and
// the box that one instruction copies. A box's rows of 128 bytes land swizzled, so that a column of 16-byte
// pieces lies in different banks.
struct View {
    const void* matrix;
    cuuint64_t sizes[3];
    cuuint64_t strides[2];
    cuuint32_t box[3];
};

// The driver's function, found at run time: nothing links against the driver.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

inline bool encode(CUtensorMap* map, DType dtype, const View& view) {
    static const auto encode_tiled = tensor_map_encoder();
    constexpr cuuint32_t steps[3] = {1, 1, 1};
    const auto type = dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    return encode_tiled &&
           encode_tiled(map, type, 3, const_cast<void*>(view.matrix), view.sizes, view.strides, view.box, steps,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace nanopd
