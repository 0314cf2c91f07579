// Facts about the current device that launches depend on.
#include <atomic>

#include "common.cuh"

namespace nanopd {
namespace {

// Asking CUDA takes longer than a launch should, so each answer is kept. Answers are above 0; 0 means not asked yet.
template <typename Ask>
int per_device(Ask ask) {
    constexpr int max_devices = 64;
    static std::atomic<int> answers[max_devices];
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device >= max_devices) return ask(device);
    int answer = answers[device].load(std::memory_order_relaxed);
    if (answer == 0) answers[device].store(answer = ask(device), std::memory_order_relaxed);
    return answer;
}

int attribute(cudaDeviceAttr name, int device) {
    int value = 0;
    cudaDeviceGetAttribute(&value, name, device);
    return value;
}

}  // namespace

int compute_capability() {
    return per_device([](int device) {
        return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
               attribute(cudaDevAttrComputeCapabilityMinor, device);
    });
}

int multiprocessor_count() {
    return per_device([](int device) { return attribute(cudaDevAttrMultiProcessorCount, device); });
}

}  // namespace nanopd
