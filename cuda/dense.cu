#include "cuda/dense.h"

#include <cublasLt.h>

#include <map>
#include <mutex>
#include <string>
#include <tuple>

#include "cuda/launch.h"
#include "cuda/library.h"
#include "cuda/scratch.h"
#include "cuda/status.h"

namespace moebius::cuda {
namespace {

struct CublasLt : Library {
  CublasLt() : Library("MOEBIUS_CUBLASLT_LIBRARY", "libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR)) {}
  MOEBIUS_LIBRARY_FUNCTION(create, cublasLtCreate);
  MOEBIUS_LIBRARY_FUNCTION(describe, cublasLtMatmulDescCreate);
  MOEBIUS_LIBRARY_FUNCTION(set_product, cublasLtMatmulDescSetAttribute);
  MOEBIUS_LIBRARY_FUNCTION(lay_out, cublasLtMatrixLayoutCreate);
  MOEBIUS_LIBRARY_FUNCTION(prefer, cublasLtMatmulPreferenceCreate);
  MOEBIUS_LIBRARY_FUNCTION(set_preference, cublasLtMatmulPreferenceSetAttribute);
  MOEBIUS_LIBRARY_FUNCTION(destroy_preference, cublasLtMatmulPreferenceDestroy);
  MOEBIUS_LIBRARY_FUNCTION(choose, cublasLtMatmulAlgoGetHeuristic);
  MOEBIUS_LIBRARY_FUNCTION(multiply, cublasLtMatmul);

  static const CublasLt& get() {
    static const CublasLt& library = *new CublasLt;
    return library;
  }
};

constexpr uint32_t kAlignment = 16;  // of all matrices, at least

// A product of certain sizes: y[rows, n] = x[rows, k] · w[n, k]ᵀ; to cuBLASLt, which has columns first, yᵀ = w · xᵀ.
struct Product {
  cublasLtMatmulDesc_t description = nullptr;
  cublasLtMatrixLayout_t w = nullptr, x = nullptr, y = nullptr;
  cublasLtMatmulAlgo_t algorithm{};
};
using Sizes = std::tuple<int, int64_t, int64_t, int64_t, int64_t, int64_t>;  // device, n, k, rows, ldx, ldy

std::mutex mutex;  // of what follows
std::map<int, cublasLtHandle_t>& handles = *new std::map<int, cublasLtHandle_t>;  // [device]
std::map<Sizes, Product>& products = *new std::map<Sizes, Product>;               // sizes are few: rows of a step's logits

cublasStatus_t make(cublasLtHandle_t handle, int64_t n, int64_t k, int64_t rows, int64_t ldx, int64_t ldy, Product& p) {
  const CublasLt& lt = CublasLt::get();
  const cublasOperation_t transposed = CUBLAS_OP_T;
  cublasLtMatmulPreference_t preference = nullptr;
  cublasStatus_t s = lt.describe(&p.description, CUBLAS_COMPUTE_32F, CUDA_R_32F);
  const auto then = [&](auto&& f) {
    if (s == CUBLAS_STATUS_SUCCESS) s = f();
  };
  const auto size = [](int64_t v) { return static_cast<uint64_t>(v); };
  then([&] { return lt.set_product(p.description, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed); });
  then([&] { return lt.lay_out(&p.w, CUDA_R_16BF, size(k), size(n), k); });
  then([&] { return lt.lay_out(&p.x, CUDA_R_16BF, size(k), size(rows), ldx); });
  then([&] { return lt.lay_out(&p.y, CUDA_R_32F, size(n), size(rows), ldy); });
  then([&] { return lt.prefer(&preference); });
  then([&] { return lt.set_preference(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &kDenseScratch, sizeof kDenseScratch); });
  for (const auto aligned : {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                             CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
    then([&] { return lt.set_preference(preference, aligned, &kAlignment, sizeof kAlignment); });
  cublasLtMatmulHeuristicResult_t chosen{};
  int found = 0;
  then([&] { return lt.choose(handle, p.description, p.w, p.x, p.y, p.y, preference, 1, &chosen, &found); });
  if (preference != nullptr) (void)lt.destroy_preference(preference);
  if (s == CUBLAS_STATUS_SUCCESS && found == 0) s = CUBLAS_STATUS_NOT_SUPPORTED;
  p.algorithm = chosen.algo;
  return s;
}

}  // namespace

int32_t open_dense(ModuleStatus& status) {
  const CublasLt& lt = CublasLt::get();
  if (!lt.failure().empty()) return refuse(status, Code::kUnsupported, "mode fast needs cuBLASLt: %s; mode exact does not", lt.failure().c_str());
  int device = 0;
  (void)cudaGetDevice(&device);
  std::lock_guard lock(mutex);
  cublasLtHandle_t& handle = handles[device];
  if (handle == nullptr && lt.create(&handle) != CUBLAS_STATUS_SUCCESS)
    return refuse(status, Code::kRankFailed, "cuBLASLt cannot be used on device %d", device);
  return 0;
}

void dense_linear(const LinearArgs& args, const Lane& lane) {
  int device = 0;
  (void)cudaGetDevice(&device);
  starts_late = true;
  constexpr const char* kFailure = "a product by cuBLASLt";
  const float one = 1, zero = 0;
  for (int i = 0; i < args.num_parts; ++i) {
    const LinearPart& part = args.parts[i];
    const int64_t rows = args.rows.size();
    cublasLtHandle_t handle;
    Product product;
    {
      std::lock_guard lock(mutex);
      handle = handles[device];
      const Sizes sizes{device, part.n, args.k, rows, args.ldx, part.ldy};
      auto known = products.find(sizes);
      if (known == products.end()) {
        if (make(handle, part.n, args.k, rows, args.ldx, part.ldy, product) != CUBLAS_STATUS_SUCCESS) {
          failed_op = kFailure;
          return;
        }
        known = products.emplace(sizes, product).first;
      }
      product = known->second;
    }
    if (CublasLt::get().multiply(handle, product.description, &one, part.w, product.w, args.x + args.rows.begin * args.ldx, product.x, &zero,
                                part.y + args.rows.begin * part.ldy, product.y, part.y + args.rows.begin * part.ldy, product.y, &product.algorithm,
                                scratch_of<std::byte>(lane), kDenseScratch, static_cast<cudaStream_t>(lane.queue)) != CUBLAS_STATUS_SUCCESS) {
      failed_op = kFailure;
      return;
    }
  }
}

}  // namespace moebius::cuda
