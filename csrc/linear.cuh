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

__device__ __forceinline__ __nv_bfloat162 normalise(__nv_bfloat162 x, __nv_bfloat162 weight, float inverse_rms) {
    const float2 values = __bfloat1622float2(x);
    return __hmul2(weight, __floats2bfloat162_rn(values.x * inverse_rms, values.y * inverse_rms));
}
__device__ __forceinline__ __half2 normalise(__half2 x, __half2 weight, float inverse_rms) {
    const float2 values = __half22float2(x);
    return __hmul2(weight, __floats2half2_rn(values.x * inverse_rms, values.y * inverse_rms));
}

template <typename T>
struct PairOf;
template <>
struct PairOf<__nv_bfloat16> { using Type = __nv_bfloat162; };
template <>
struct PairOf<__half> { using Type = __half2; };

// Eight columns of x become eight columns of its norm: rounded before the weight and after it, as rms_norm does.
template <typename T>
__device__ __forceinline__ Fragment normalise(Fragment x, Fragment weight, float inverse_rms) {
    using Pair = typename PairOf<T>::Type;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        Pair& pair = reinterpret_cast<Pair&>(x.words[i]);
        pair = normalise(pair, reinterpret_cast<const Pair&>(weight.words[i]), inverse_rms);
    }
    return x;
}

template <typename T>
__device__ __forceinline__ float value_at(const void* pointer, int64_t i) {
    return to_float(static_cast<const T*>(pointer)[i]);
}

// What is added to output [token, row] of `rows`; read ahead of its sums, it is there when they are.
struct Addends {
    float bias, up_bias, residual;
};

template <typename T, bool kSilu>
__device__ __forceinline__ Addends addends_of(const LinearArguments& arguments, int token, int row, int rows) {
    Addends addends{};
    if (arguments.bias) addends.bias = value_at<T>(arguments.bias, row);
    if (kSilu && arguments.bias) addends.up_bias = value_at<T>(arguments.bias, row + rows);
    if (arguments.residual) addends.residual = value_at<T>(arguments.residual, static_cast<int64_t>(token) * rows + row);
    return addends;
}

// The end of that output: bias, silu, residual, and the one rounding. `up` counts with silu only.
template <typename T, bool kSilu>
__device__ __forceinline__ void finish(const LinearArguments& arguments, float y, float up, const Addends& addends,
                                       int token, int row, int rows) {
    y += addends.bias;
    if constexpr (kSilu) y = y / (1.0f + __expf(-y)) * (up + addends.up_bias);
    static_cast<T*>(arguments.out)[static_cast<int64_t>(token) * rows + row] = from_float<T>(y + addends.residual);
}

}  // namespace nanopd
