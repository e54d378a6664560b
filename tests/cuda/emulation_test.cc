// The emulator itself: what the other tests rest on.
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "tests/catch.h"

namespace moebius::cuda {
namespace {

__global__ void reverse_kernel(int* data, int n) {
  follow_previous();
  __shared__ int copy[256];
  const int i = static_cast<int>(threadIdx.x);
  if (i < n) copy[i] = data[static_cast<int>(blockIdx.x) * n + i];
  __syncthreads();
  if (i < n) data[static_cast<int>(blockIdx.x) * n + i] = copy[n - 1 - i];
}

__global__ void sum_kernel(const float* x, float* sums) {
  follow_previous();
  float v = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (int bits = 16; bits > 0; bits /= 2) v += __shfl_xor_sync(0xffffffffu, v, bits);
  const unsigned odd = __ballot_sync(0xffffffffu, threadIdx.x % 2);
  if (threadIdx.x % 32 == 0) sums[blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32] = v + static_cast<float>(__popc(odd));
}

__global__ void mma_kernel(const bf16* a, const bf16* b, float* d) {
  follow_previous();
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  const auto pair = [](const bf16* p) { return static_cast<uint32_t>(p[0]) | static_cast<uint32_t>(p[1]) << 16; };
  const uint32_t fa[4] = {pair(a + g * 16 + 2 * t), pair(a + (g + 8) * 16 + 2 * t), pair(a + g * 16 + 2 * t + 8), pair(a + (g + 8) * 16 + 2 * t + 8)};
  const uint32_t fb[2] = {pair(b + g * 16 + 2 * t), pair(b + g * 16 + 2 * t + 8)};
  float out[4] = {1, 1, 1, 1};
  mma_bf16(out, fa, fb);
  for (int e = 0; e < 4; ++e) d[(g + e / 2 * 8) * 8 + 2 * t + e % 2] = out[e];
}

__global__ void reverse_without_barrier_kernel(int* data) {
  follow_previous();
  __shared__ int copy[256];
  const int i = static_cast<int>(threadIdx.x);
  copy[i] = data[i];
  data[i] = copy[255 - i];
}

__global__ void lanes_left_kernel(int* out) {
  follow_previous();
  if (threadIdx.x % 32 >= 16) return;
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, static_cast<int>(threadIdx.x), 1);
}
__global__ void lanes_elsewhere_kernel(int* out) {
  follow_previous();
  if (threadIdx.x % 32 >= 16) __syncthreads();
  else out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, static_cast<int>(threadIdx.x), 1);
}
__global__ void mask_without_caller_kernel(int* out) {
  follow_previous();
  out[threadIdx.x] = __shfl_sync(0xffffu, static_cast<int>(threadIdx.x), 0);
}
__global__ void masks_differ_kernel(int* out) {
  follow_previous();
  out[threadIdx.x] = __shfl_sync(threadIdx.x == 0 ? 0x3u : 0xffffffffu, static_cast<int>(threadIdx.x), 0);
}
__global__ void functions_differ_kernel(int* out) {
  follow_previous();
  if (threadIdx.x % 2 == 0) out[threadIdx.x] = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x), 0);
  else __syncwarp();
}

__global__ void goes_ahead_kernel(int* out) {
  begin_next();
  if (threadIdx.x > 0) await_previous();
  out[threadIdx.x] = 0;
}

// What a kernel that ends the program says, found by a child process; empty when it runs to its end.
std::string report_of(void (*kernel)(int*)) {
  int ends[2];
  REQUIRE(pipe(ends) == 0);
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    std::signal(SIGABRT, SIG_DFL);
    alarm(10);
    dup2(ends[1], STDERR_FILENO);
    int out[64];
    launch(kernel, 1, 64, 0, nullptr, +out);
    _exit(0);
  }
  close(ends[1]);
  std::string text;
  char part[256];
  for (ssize_t n; (n = read(ends[0], part, sizeof part)) > 0;) text.append(part, static_cast<size_t>(n));
  close(ends[0]);
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(text.empty() == (status == 0));
  CHECK((status == 0 || (WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT)));
  return text;
}

}  // namespace

TEST_CASE("barriers order the threads of a block") {
  std::vector<int> data(3 * 200);
  for (int i = 0; i < 600; ++i) data[static_cast<size_t>(i)] = i;
  launch(reverse_kernel, 3, 224, 0, nullptr, data.data(), 200);
  for (int i = 0; i < 600; ++i) REQUIRE(data[static_cast<size_t>(i)] == i / 200 * 200 + 199 - i % 200);
}

TEST_CASE("warp functions see every lane") {
  std::vector<float> x(4 * 64), sums(8);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i);
  launch(sum_kernel, 4, 64, 0, nullptr, x.data(), sums.data());
  for (size_t w = 0; w < 8; ++w) CHECK(sums[w] == static_cast<float>(32 * (32 * w) + 31 * 16 + 16));
}

TEST_CASE("a tensor product is the plain one") {
  std::vector<bf16> a(16 * 16), b(8 * 16);
  for (size_t i = 0; i < a.size(); ++i) a[i] = to_bf16(static_cast<float>(static_cast<int>(i * 7 % 31) - 15));
  for (size_t i = 0; i < b.size(); ++i) b[i] = to_bf16(static_cast<float>(static_cast<int>(i * 5 % 23) - 11));
  std::vector<float> d(16 * 8);
  launch(mma_kernel, 1, 32, 0, nullptr, a.data(), b.data(), d.data());
  for (size_t r = 0; r < 16; ++r)
    for (size_t c = 0; c < 8; ++c) {
      float sum = 1;
      for (size_t k = 0; k < 16; ++k) sum += to_float(a[r * 16 + k]) * to_float(b[c * 16 + k]);
      CHECK(d[r * 8 + c] == sum);
    }
}

TEST_CASE("a missing barrier shows") {
  std::vector<int> data(256);
  for (int i = 0; i < 256; ++i) data[static_cast<size_t>(i)] = i;
  launch(reverse_without_barrier_kernel, 1, 256, 0, nullptr, data.data());
  int wrong = 0;
  for (int i = 0; i < 256; ++i) wrong += data[static_cast<size_t>(i)] != 255 - i;
  CHECK(wrong > 0);  // each thread comes before its partner with a chance of a half
}

TEST_CASE("lanes that do not meet as they must are reported") {
  using Catch::Matchers::Contains;
  CHECK_THAT(report_of(lanes_left_kernel), Contains("has ended"));
  CHECK_THAT(report_of(lanes_elsewhere_kernel), Contains("others of its mask never call"));
  CHECK_THAT(report_of(mask_without_caller_kernel), Contains("leaves it out"));
  CHECK_THAT(report_of(masks_differ_kernel), Contains("others of its mask never call"));
  CHECK_THAT(report_of(functions_differ_kernel), Contains("different warp functions"));
}

TEST_CASE("a thread that does not await the kernels ahead is reported") {
  CHECK_THAT(report_of(goes_ahead_kernel), Catch::Matchers::Contains("has not awaited"));
}

TEST_CASE("a stream with new work is not ready when it is asked at once, and that stays as the thread's error") {
  cudaStream_t stream = nullptr;
  REQUIRE(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess);
  CHECK(cudaStreamQuery(stream) == cudaSuccess);
  char byte = 1;
  REQUIRE(cudaMemsetAsync(&byte, 0, 1, stream) == cudaSuccess);
  CHECK(cudaStreamQuery(stream) == cudaErrorNotReady);
  CHECK(cudaGetLastError() == cudaErrorNotReady);
  CHECK(cudaStreamQuery(stream) == cudaSuccess);
  CHECK(cudaGetLastError() == cudaSuccess);
  CHECK(cudaStreamDestroy(stream) == cudaSuccess);
}

TEST_CASE("how many blocks of a kernel a device holds is asked with the shared memory that it will have") {
  int blocks = -1;
  CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, reverse_kernel, 256, 40 << 10) == cudaSuccess);
  CHECK(blocks == 0);
  CHECK(resident_blocks(reverse_kernel, 256, 40 << 10) == resident_blocks(4));
}

TEST_CASE("a launch that no device takes is an error of the thread that asked") {
  launch(reverse_kernel, 1, 2048, 0, nullptr, static_cast<int*>(nullptr), 0);
  CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration);
  CHECK(cudaGetLastError() == cudaSuccess);
}

}  // namespace moebius::cuda
