// What the kernels of `linear` share: a step of the tensor cores, the norm of a piece of x, the end of an output.
#pragma once

#include "common.cuh"

namespace nanopd {

// linear_hopper.cu: the kernels for Hopper.
bool hopper_linear_supports(int tokens, int in_features);
cudaError_t hopper_linear(const LinearArguments& arguments, cudaStream_t stream);

// 16 bytes of a row of weights or of x: 8 consecutive columns.
struct alignas(16) Fragment {
    uint32_t words[4];
};

__device__ __forceinline__ void mma(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1, __nv_bfloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1, __half) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// sums[16 x 8] += 16 rows of weights times 8 tokens over the 32 columns of which each of four lanes holds 8. An mma
// takes columns 2t, 2t + 1, 2t + 8, 2t + 9 from lane t, but the order of a sum is free: both operands give the same
// columns in the same order, and each lane's 8 make its share of two mma's.
template <typename T>
__device__ __forceinline__ void multiply(float (&sums)[4], const Fragment& low, const Fragment& high, const Fragment& x,
                                         T type) {
    mma(sums, low.words[0], high.words[0], low.words[1], high.words[1], x.words[0], x.words[1], type);
    mma(sums, low.words[2], high.words[2], low.words[3], high.words[3], x.words[2], x.words[3], type);
}

// Eight columns of x become eight columns of its norm: rounded before the weight and after it, as rms_norm does.
template <typename T>
__device__ __forceinline__ Fragment normalise(const Fragment& x, const Pack<T>& weight, float inverse_rms) {
    const Pack<T>& values = reinterpret_cast<const Pack<T>&>(x);
    Pack<T> out;
#pragma unroll
    for (int i = 0; i < Pack<T>::size; i++)
        out.values[i] = weight.values[i] * from_float<T>(to_float(values.values[i]) * inverse_rms);
    return reinterpret_cast<const Fragment&>(out);
}

template <typename T>
__device__ __forceinline__ float value_at(const void* pointer, int64_t i) {
    return to_float(static_cast<const T*>(pointer)[i]);
}

// The end of output [token, row] of `rows`: bias, silu, residual, and the one rounding. `up` counts with silu only.
template <typename T, bool kSilu>
__device__ __forceinline__ void finish(const LinearArguments& arguments, float y, float up, int token, int row,
                                       int rows) {
    if (arguments.bias) y += value_at<T>(arguments.bias, row);
    if constexpr (kSilu) {
        if (arguments.bias) up += value_at<T>(arguments.bias, row + rows);
        y = y / (1.0f + __expf(-y)) * up;
    }
    const int64_t at = static_cast<int64_t>(token) * rows + row;
    if (arguments.residual) y += value_at<T>(arguments.residual, at);
    static_cast<T*>(arguments.out)[at] = from_float<T>(y);
}

}  // namespace nanopd
