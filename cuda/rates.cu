// moebius-gpu-rates: what a device gives at best, as one JSON object: the floors that figures stand beside. Rates are per second, the best of
// some repetitions. `matrix_flops` is a product of 8,192³ in bf16 by cuBLASLt, a multiply-add counted twice.
#include <cublasLt.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace {

void check(int error, const char* what) {
  if (error == 0) return;
  std::fprintf(stderr, "moebius-gpu-rates: %s failed (%d)\n", what, error);
  std::exit(1);
}

__global__ void read_kernel(const uint4* data, size_t words, unsigned* out) {
  unsigned sum = 0;
  const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i + 3 * stride < words; i += 4 * stride) {
    const uint4 a = __ldcs(data + i), b = __ldcs(data + i + stride), c = __ldcs(data + i + 2 * stride), d = __ldcs(data + i + 3 * stride);
    sum += a.x ^ b.y ^ c.z ^ d.w;
  }
  for (; i < words; i += stride) sum += data[i].x;
  if (sum == 0x12345678u) *out = sum;  // never, but the compiler does not know
}

// Numbers as bf16 of either sign between 0.5 and 2: what is multiplied must not be all alike, or the device need not work as hard.
__global__ void fill_kernel(uint32_t* data, size_t words, uint32_t seed) {
  for (size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < words; i += static_cast<size_t>(gridDim.x) * blockDim.x) {
    uint32_t x = static_cast<uint32_t>(i) * 2654435761u + seed;
    x ^= x >> 15, x *= 2246822519u, x ^= x >> 13;
    data[i] = (x & 0x80ff80ffu) | 0x3f003f00u;
  }
}

// Seconds of one run, the best of twelve after a warm one.
template <class F>
double best_seconds(F&& f) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "an event");
  check(cudaEventCreate(&end), "an event");
  double best = 1e30;
  for (int i = 0; i < 13; ++i) {
    check(cudaEventRecord(begin), "an event");
    f();
    check(cudaEventRecord(end), "an event");
    check(cudaEventSynchronize(end), "the work");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end), "an event");
    if (i > 0) best = std::min(best, static_cast<double>(ms) * 1e-3);
  }
  return best;
}

double matrix_seconds(void* a, void* b, void* c, int n) {
  cublasLtHandle_t handle;
  check(cublasLtCreate(&handle), "cuBLASLt");
  cublasLtMatmulDesc_t product;
  check(cublasLtMatmulDescCreate(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cuBLASLt");
  const cublasOperation_t transposed = CUBLAS_OP_T;
  check(cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed), "cuBLASLt");
  cublasLtMatrixLayout_t layout;
  check(cublasLtMatrixLayoutCreate(&layout, CUDA_R_16BF, static_cast<uint64_t>(n), static_cast<uint64_t>(n), n), "cuBLASLt");
  constexpr size_t kWorkspace = 32 << 20;
  void* workspace = nullptr;
  check(cudaMalloc(&workspace, kWorkspace), "memory");
  cublasLtMatmulPreference_t preference;
  check(cublasLtMatmulPreferenceCreate(&preference), "cuBLASLt");
  check(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &kWorkspace, sizeof kWorkspace), "cuBLASLt");
  cublasLtMatmulHeuristicResult_t chosen[8];
  int found = 0;
  check(cublasLtMatmulAlgoGetHeuristic(handle, product, layout, layout, layout, layout, preference, 8, chosen, &found), "cuBLASLt");
  const float one = 1, zero = 0;
  double best = 1e30;
  for (int i = 0; i < found; ++i)
    best = std::min(best, best_seconds([&] {
      check(cublasLtMatmul(handle, product, &one, a, layout, b, layout, &zero, c, layout, c, layout, &chosen[i].algo, workspace, kWorkspace, nullptr),
            "a product");
    }));
  (void)cudaFree(workspace);
  cublasLtMatmulPreferenceDestroy(preference);
  cublasLtMatrixLayoutDestroy(layout);
  cublasLtMatmulDescDestroy(product);
  cublasLtDestroy(handle);
  return best;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 2 || (argc == 2 && argv[1][0] == '-')) {
    std::printf("usage: moebius-gpu-rates [DEVICE]\nPrints a device's name and its best rates of reading, copying and multiplying as JSON.\n");
    return argc > 2 ? 2 : 0;
  }
  const int device = argc == 2 ? std::atoi(argv[1]) : 0;
  int count = 0, driver = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || device >= count) {
    std::fprintf(stderr, "moebius-gpu-rates: there is no device %d\n", device);
    return 77;
  }
  check(cudaSetDevice(device), "the device");
  check(cudaDriverGetVersion(&driver), "the driver's version");
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device), "the device's properties");

  constexpr size_t kBytes = size_t{1} << 30;
  constexpr int kSide = 8192;
  void *from = nullptr, *to = nullptr;
  unsigned* sink = nullptr;
  check(cudaMalloc(&from, kBytes), "memory");
  check(cudaMalloc(&to, kBytes), "memory");
  check(cudaMalloc(&sink, sizeof *sink), "memory");
  fill_kernel<<<properties.multiProcessorCount * 8, 256>>>(static_cast<uint32_t*>(from), kBytes / 4, 1);
  fill_kernel<<<properties.multiProcessorCount * 8, 256>>>(static_cast<uint32_t*>(to), kBytes / 4, 2);
  check(cudaGetLastError(), "filling memory");
  const double read = best_seconds([&] { read_kernel<<<properties.multiProcessorCount * 16, 256>>>(static_cast<const uint4*>(from), kBytes / 16, sink); });
  const double copy = best_seconds([&] { check(cudaMemcpyAsync(to, from, kBytes, cudaMemcpyDeviceToDevice), "a copy"); });
  char* c = static_cast<char*>(to);
  const double matrix = matrix_seconds(from, c, c + kBytes / 2, kSide);
  std::printf("{\"device\":\"%s\",\"multiprocessors\":%d,\"memory_bytes\":%zu,\"cuda_driver\":%d,\"read_bytes_per_second\":%.6g,\"copy_bytes_per_second\":%.6g,"
              "\"matrix_flops\":%.6g}\n",
              properties.name, properties.multiProcessorCount, properties.totalGlobalMem, driver, static_cast<double>(kBytes) / read,
              static_cast<double>(kBytes) / copy, 2.0 * kSide * kSide * kSide / matrix);
  return 0;
}
