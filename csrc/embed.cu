// The start of a step: from token ids to the residual stream, and from positions to rotations.
#include "common.cuh"

namespace nanopd {
namespace {

constexpr int threads = 256;

template <typename T>
__device__ void copy_row(T* out, const T* row, int size) {
    if (size % Pack<T>::size == 0) {
        for (int i = threadIdx.x; i < size / Pack<T>::size; i += threads)
            reinterpret_cast<Pack<T>*>(out)[i] = reinterpret_cast<const Pack<T>*>(row)[i];
    } else {
        for (int i = threadIdx.x; i < size; i += threads) out[i] = row[i];
    }
}

// One thread block for each token.
template <typename T>
__global__ void embed_kernel(const EmbedArguments a) {
    wait_for_previous();
    let_next_start();  // in this order: decode_attention relies on what came before this kernel being complete
    const int64_t token = blockIdx.x, id = a.token_ids[token], position = a.positions[token];
    const int64_t known = id >= 0 ? id : a.last_drawn[-1 - id];
    copy_row(static_cast<T*>(a.out) + token * a.hidden_size, static_cast<const T*>(a.weight) + known * a.hidden_size,
             a.hidden_size);
    copy_row(static_cast<T*>(a.cos) + token * a.head_dim, static_cast<const T*>(a.cos_table) + position * a.head_dim,
             a.head_dim);
    copy_row(static_cast<T*>(a.sin) + token * a.head_dim, static_cast<const T*>(a.sin_table) + position * a.head_dim,
             a.head_dim);
}

}  // namespace

cudaError_t embed(const EmbedArguments& arguments, DType dtype, cudaStream_t stream) {
    return dispatch(dtype, [&](auto element) {
        return launch(embed_kernel<decltype(element)>, arguments.num_tokens, threads, 0, stream, arguments);
    });
}

}  // namespace nanopd
