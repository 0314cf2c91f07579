// Moving blocks of the cache: copy-on-write within one, transfers from one to another, on this GPU or a peer.
#include <algorithm>

#include "common.cuh"

namespace nanopd {
namespace {

constexpr int threads = 256;
constexpr int loads = 8;           // that each lane has in flight
constexpr int piece = 32 * loads;  // units that a warp moves at a time

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

// Moves units of 16 bytes, or of 2 for blocks that are no multiple of 16.
template <typename Unit>
__global__ void move_blocks_kernel(const MoveArguments a) {
    wait_for_previous();  // and nothing may start early: decode_attention reads blocks before it waits
    const int64_t warps = int64_t(gridDim.x) * (threads / 32);
    const int lane = threadIdx.x % 32;
    for (int64_t p = (int64_t(blockIdx.x) * threads + threadIdx.x) / 32; p < a.pieces; p += warps) {
        const int64_t block = p / a.pieces_per_block, plane = block / a.num_blocks, index = block % a.num_blocks;
        const int64_t source_id = a.source_ids ? a.source_ids[index] : index;
        const int64_t target_id = a.target_ids ? a.target_ids[index] : index;
        const char* source = a.source + plane * a.source_plane_bytes + source_id * a.block_bytes;
        char* target = a.target + plane * a.target_plane_bytes + target_id * a.block_bytes;
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

template <typename Unit>
cudaError_t launch_move_blocks(MoveArguments arguments, int planes, int max_thread_blocks, cudaStream_t stream) {
    arguments.pieces_per_block = (arguments.block_bytes / int64_t(sizeof(Unit)) + piece - 1) / piece;
    arguments.pieces = arguments.pieces_per_block * planes * arguments.num_blocks;
    if (arguments.pieces == 0) return cudaSuccess;
    const int64_t wanted = (arguments.pieces + threads / 32 - 1) / (threads / 32);
    const int most = max_thread_blocks > 0 ? max_thread_blocks : 8 * multiprocessor_count();
    const int grid = static_cast<int>(std::min<int64_t>(wanted, most));
    // A multiprocessor divides its memory anew only when it is empty. Had this kernel it divide for L1, a matrix product
    // beside it would have to wait for this one's end.
    const cudaError_t error = cudaFuncSetAttribute(
        move_blocks_kernel<Unit>, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (error != cudaSuccess) return error;
    return launch(move_blocks_kernel<Unit>, grid, threads, 0, stream, arguments);
}

}  // namespace

cudaError_t move_blocks(void* target, const int64_t* target_ids, int64_t target_plane_bytes, const void* source,
                        const int64_t* source_ids, int64_t source_plane_bytes, int planes, int num_blocks,
                        int64_t block_bytes, int max_thread_blocks, cudaStream_t stream) {
    const MoveArguments arguments{static_cast<char*>(target), target_ids, target_plane_bytes,
                                  static_cast<const char*>(source), source_ids, source_plane_bytes,
                                  num_blocks, block_bytes, 0, 0};
    const uintptr_t bases = reinterpret_cast<uintptr_t>(target) | reinterpret_cast<uintptr_t>(source);
    if (block_bytes % 16 == 0 && bases % 16 == 0) {
        return launch_move_blocks<uint4>(arguments, planes, max_thread_blocks, stream);
    }
    return launch_move_blocks<uint16_t>(arguments, planes, max_thread_blocks, stream);
}

}  // namespace nanopd
