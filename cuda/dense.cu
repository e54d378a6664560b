#include "cuda/dense.h"

#include <cublasLt.h>
#include <dlfcn.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <tuple>

#include "cuda/launch.h"
#include "cuda/status.h"

namespace moebius::cuda {
namespace {

// cuBLASLt's functions.
struct Library {
  decltype(&cublasLtCreate) create = nullptr;
  decltype(&cublasLtMatmulDescCreate) describe = nullptr;
  decltype(&cublasLtMatmulDescSetAttribute) set_product = nullptr;
  decltype(&cublasLtMatrixLayoutCreate) lay_out = nullptr;
  decltype(&cublasLtMatmulPreferenceCreate) prefer = nullptr;
  decltype(&cublasLtMatmulPreferenceSetAttribute) set_preference = nullptr;
  decltype(&cublasLtMatmulAlgoGetHeuristic) choose = nullptr;
  decltype(&cublasLtMatmul) multiply = nullptr;
  std::string failure;  // why it could not be loaded

  Library() {
#ifdef MOEBIUS_EMULATED
#define MOEBIUS_FIND(function) &function
#else
    const char* named = std::getenv("MOEBIUS_CUBLASLT_LIBRARY");
    const std::string file = named != nullptr && *named != '\0' ? named : "libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR);
    void* handle = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (handle == nullptr) {
      failure = std::string(dlerror()) + " (MOEBIUS_CUBLASLT_LIBRARY names the file)";
      return;
    }
    const auto find = [&](const char* name) {
      void* function = dlsym(handle, name);
      if (function == nullptr) failure = file + " has no " + name;
      return function;
    };
#define MOEBIUS_FIND(function) reinterpret_cast<decltype(&function)>(find(#function))
#endif
    create = MOEBIUS_FIND(cublasLtCreate);
    describe = MOEBIUS_FIND(cublasLtMatmulDescCreate);
    set_product = MOEBIUS_FIND(cublasLtMatmulDescSetAttribute);
    lay_out = MOEBIUS_FIND(cublasLtMatrixLayoutCreate);
    prefer = MOEBIUS_FIND(cublasLtMatmulPreferenceCreate);
    set_preference = MOEBIUS_FIND(cublasLtMatmulPreferenceSetAttribute);
    choose = MOEBIUS_FIND(cublasLtMatmulAlgoGetHeuristic);
    multiply = MOEBIUS_FIND(cublasLtMatmul);
#undef MOEBIUS_FIND
  }
  static const Library& get() {
    static const Library library;
    return library;
  }
};

// A product of certain sizes: y[rows, n] = x[rows, k] · w[n, k]ᵀ; to cuBLASLt, which has columns first, yᵀ = w · xᵀ.
struct Product {
  cublasLtMatmulDesc_t description = nullptr;
  cublasLtMatrixLayout_t w = nullptr, x = nullptr, y = nullptr;
  cublasLtMatmulAlgo_t algorithm{};
};
using Sizes = std::tuple<int, int64_t, int64_t, int64_t, int64_t, int64_t>;  // device, n, k, rows, ldx, ldy

std::mutex mutex;  // of what follows
std::map<int, cublasLtHandle_t> handles;  // [device]
std::map<Sizes, Product> products;        // sizes are few: rows of a step's logits

cublasStatus_t make(cublasLtHandle_t handle, int64_t n, int64_t k, int64_t rows, int64_t ldx, int64_t ldy, Product& p) {
  const Library& lt = Library::get();
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
  cublasLtMatmulHeuristicResult_t chosen{};
  int found = 0;
  then([&] { return lt.choose(handle, p.description, p.w, p.x, p.y, p.y, preference, 1, &chosen, &found); });
  if (s == CUBLAS_STATUS_SUCCESS && found == 0) s = CUBLAS_STATUS_NOT_SUPPORTED;
  p.algorithm = chosen.algo;
  return s;
}

}  // namespace

int32_t open_dense(ModuleStatus& status) {
  const Library& lt = Library::get();
  if (!lt.failure.empty()) return refuse(status, Code::kUnsupported, "mode fast needs cuBLASLt: %s; mode exact does not", lt.failure.c_str());
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
    if (Library::get().multiply(handle, product.description, &one, part.w, product.w, args.x + args.rows.begin * args.ldx, product.x, &zero,
                                part.y + args.rows.begin * part.ldy, product.y, part.y + args.rows.begin * part.ldy, product.y, &product.algorithm,
                                lane.scratch, kDenseScratch, static_cast<cudaStream_t>(lane.queue)) != CUBLAS_STATUS_SUCCESS) {
      failed_op = kFailure;
      return;
    }
  }
}

}  // namespace moebius::cuda
