// Moving blocks of the cache: copy-on-write within one, transfers from one to another, on this GPU or a peer.
#include <algorithm>

#include "common.cuh"
#include "hopper.cuh"

namespace nanopd {
namespace {

constexpr int threads = 256;
constexpr int loads = 8;           // that each lane has in flight
constexpr int piece = 32 * loads;  // units that a warp moves at a time

// Of the kernel that moves by TMA. On Hopper a thread block of a matrix product takes 64512 registers of 65536 and about
// 200 KiB of shared memory of 227: a warp with 32 registers a thread and this memory still fit beside it.
constexpr int stages = 4;
constexpr int stage_bytes = 4096;

struct MoveArguments {
    char* target;
    const int64_t* target_ids;
    int64_t target_plane_bytes;
    const char* source;
    const int64_t* source_ids;
    int64_t source_plane_bytes;
    int num_blocks;
    int64_t block_bytes;
    int64_t pieces_per_block;
    int64_t pieces;
};

struct Places {
    const char* source;
    char* target;
};

// Where the block of a piece is, and where it belongs.
__device__ __forceinline__ Places places_of(const MoveArguments& a, int64_t p) {
    const int64_t block = p / a.pieces_per_block, plane = block / a.num_blocks, index = block % a.num_blocks;
    const int64_t source_id = a.source_ids ? a.source_ids[index] : index;
    const int64_t target_id = a.target_ids ? a.target_ids[index] : index;
    return {a.source + plane * a.source_plane_bytes + source_id * a.block_bytes,
            a.target + plane * a.target_plane_bytes + target_id * a.block_bytes};
}

// Moves units of 16 bytes, or of 2 for blocks that are no multiple of 16.
template <typename Unit>
__global__ void move_blocks_kernel(const MoveArguments a) {
    wait_for_previous();  // and nothing may start early: decode_attention reads blocks before it waits
    const int64_t warps = int64_t(gridDim.x) * (threads / 32);
    const int lane = threadIdx.x % 32;
    for (int64_t p = (int64_t(blockIdx.x) * threads + threadIdx.x) / 32; p < a.pieces; p += warps) {
        const auto [source, target] = places_of(a, p);
        const int64_t first = (p % a.pieces_per_block) * piece + lane, count = a.block_bytes / int64_t(sizeof(Unit));
        Unit values[loads];
#pragma unroll
        for (int i = 0; i < loads; ++i) {
            if (first + i * 32 < count) values[i] = reinterpret_cast<const Unit*>(source)[first + i * 32];
        }
#pragma unroll
        for (int i = 0; i < loads; ++i) {
            if (first + i * 32 < count) reinterpret_cast<Unit*>(target)[first + i * 32] = values[i];
        }
    }
}

// By TMA, through shared memory, with which few multiprocessors fill a link. Each thread has a stage of its own. Only TMA
// touches a stage, and the next copy of it is asked for when the one before has been waited for, so no fence is needed
// between them; nor for what earlier kernels wrote, since this one reads behind their end.
__global__ void __launch_bounds__(stages) tma_move_blocks_kernel(const MoveArguments a) {
#if __CUDA_ARCH__ >= 900
    __shared__ alignas(128) char memory[stages][stage_bytes];
    __shared__ uint64_t barriers[stages];
    char* const stage = memory[threadIdx.x];
    uint64_t* const full = &barriers[threadIdx.x];
    barrier_init(full, 1);
    publish_barriers();
    wait_for_previous();
    uint32_t parity = 0;
    // pieces side by side go to different multiprocessors, so that a few, too, keep many of them busy
    for (int64_t p = int64_t(threadIdx.x) * gridDim.x + blockIdx.x; p < a.pieces; p += int64_t(stages) * gridDim.x) {
        const auto [source, target] = places_of(a, p);
        const int64_t first = (p % a.pieces_per_block) * stage_bytes;
        const int bytes = static_cast<int>(min(int64_t(stage_bytes), a.block_bytes - first));
        wait_until_read();
        barrier_expect(full, bytes);
        load_bytes(stage, source + first, bytes, full);
        barrier_wait(full, parity);
        parity ^= 1;
        store_bytes(target + first, stage, bytes);
    }
    wait_until_written();  // whoever waits for the kernel's end reads the target next
#endif
}

struct Kernel {
    void (*function)(MoveArguments);
    int threads;
    int pieces_at_once;  // that make another thread block worth its while
    int piece_bytes;
};

cudaError_t launch_move_blocks(const Kernel& kernel, MoveArguments arguments, int planes, int max_thread_blocks,
                               cudaStream_t stream) {
    arguments.pieces_per_block = (arguments.block_bytes + kernel.piece_bytes - 1) / kernel.piece_bytes;
    arguments.pieces = arguments.pieces_per_block * planes * arguments.num_blocks;
    if (arguments.pieces == 0) return cudaSuccess;
    const int64_t wanted = (arguments.pieces + kernel.pieces_at_once - 1) / kernel.pieces_at_once;
    const int most = max_thread_blocks > 0 ? max_thread_blocks : 8 * multiprocessor_count();
    const int grid = static_cast<int>(std::min<int64_t>(wanted, most));
    // A multiprocessor divides its memory anew only when it is empty. Had this kernel it divide for L1, a matrix product
    // beside it would have to wait for this one's end.
    const cudaError_t error = cudaFuncSetAttribute(
        kernel.function, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (error != cudaSuccess) return error;
    return launch(kernel.function, grid, kernel.threads, 0, stream, arguments);
}

// TMA where there is some and the blocks suit it, but only for copies that shall leave room for others: those that may
// take the whole GPU stay within it and wait for its memory, which as many loads and stores as fit keep as busy.
Kernel kernel_for(const MoveArguments& a, int max_thread_blocks) {
    const uintptr_t bases = reinterpret_cast<uintptr_t>(a.target) | reinterpret_cast<uintptr_t>(a.source);
    if (a.block_bytes % 16 != 0 || bases % 16 != 0) {
        return {move_blocks_kernel<uint16_t>, threads, threads / 32, piece * int(sizeof(uint16_t))};
    }
    if (max_thread_blocks > 0 && compute_capability() >= 90) return {tma_move_blocks_kernel, stages, 1, stage_bytes};
    return {move_blocks_kernel<uint4>, threads, threads / 32, piece * int(sizeof(uint4))};
}

}  // namespace

cudaError_t move_blocks(void* target, const int64_t* target_ids, int64_t target_plane_bytes, const void* source,
                        const int64_t* source_ids, int64_t source_plane_bytes, int planes, int num_blocks,
                        int64_t block_bytes, int max_thread_blocks, cudaStream_t stream) {
    const MoveArguments arguments{static_cast<char*>(target), target_ids, target_plane_bytes,
                                  static_cast<const char*>(source), source_ids, source_plane_bytes,
                                  num_blocks, block_bytes, 0, 0};
    return launch_move_blocks(kernel_for(arguments, max_thread_blocks), arguments, planes, max_thread_blocks, stream);
}

}  // namespace nanopd
