// cuBLASLt on the host, as far as cuda/dense.cu uses it: a product of bf16 matrices in columns with float results, the first one transposed.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "lib/tensor/dtype.h"

#define CUBLAS_VER_MAJOR 0
enum cublasStatus_t { CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_INVALID_VALUE = 7, CUBLAS_STATUS_NOT_SUPPORTED = 15 };
enum cublasOperation_t { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 };
enum cublasComputeType_t { CUBLAS_COMPUTE_32F = 68 };
enum cudaDataType_t { CUDA_R_32F = 0, CUDA_R_16BF = 14 };
enum cublasLtMatmulDescAttributes_t { CUBLASLT_MATMUL_DESC_TRANSA = 3 };
enum cublasLtMatmulPreferenceAttributes_t {
  CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES = 6,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES = 7,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES = 8
};
using cublasLtHandle_t = void*;
using cublasLtMatmulPreference_t = void*;
struct cublasLtMatmulAlgo_t {
  int number;
};
struct cublasLtMatmulHeuristicResult_t {
  cublasLtMatmulAlgo_t algo;
};
struct EmulatedMatmul {
  bool transposed = false;
};
struct EmulatedLayout {
  cudaDataType_t type;
  uint64_t rows, columns;
  int64_t ld;
};
using cublasLtMatmulDesc_t = EmulatedMatmul*;
using cublasLtMatrixLayout_t = EmulatedLayout*;

inline cublasStatus_t cublasLtCreate(cublasLtHandle_t* out) {
  static int handle;
  *out = &handle;
  return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* out, cublasComputeType_t, cudaDataType_t) {
  *out = new EmulatedMatmul;  // for the process's lifetime
  return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t, const void* value, size_t) {
  d->transposed = *static_cast<const cublasOperation_t*>(value) == CUBLAS_OP_T;
  return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* out, cudaDataType_t type, uint64_t rows, uint64_t columns, int64_t ld) {
  if (ld < static_cast<int64_t>(rows)) return CUBLAS_STATUS_INVALID_VALUE;
  *out = new EmulatedLayout{type, rows, columns, ld};
  return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t*) { return CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t) { return CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t, const void*, size_t) {
  return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                                     cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int,
                                                     cublasLtMatmulHeuristicResult_t* out, int* found) {
  const bool fits = d->transposed && a->type == CUDA_R_16BF && b->type == CUDA_R_16BF && c->type == CUDA_R_32F && a->rows == b->rows &&
                    a->columns == c->rows && b->columns == c->columns;
  *found = fits;
  *out = {{fits ? 7 : 0}};
  return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t, const void* alpha, const void* a, cublasLtMatrixLayout_t la, const void* b,
                                     cublasLtMatrixLayout_t lb, const void* beta, const void*, cublasLtMatrixLayout_t, void* d,
                                     cublasLtMatrixLayout_t ld, const cublasLtMatmulAlgo_t* algorithm, void* workspace, size_t workspace_bytes,
                                     cudaStream_t stream) {
  if (algorithm->number != 7 || *static_cast<const float*>(alpha) != 1 || *static_cast<const float*>(beta) != 0) return CUBLAS_STATUS_INVALID_VALUE;
  for (const void* p : {a, b, static_cast<const void*>(d)})
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return CUBLAS_STATUS_NOT_SUPPORTED;
  if (reinterpret_cast<uintptr_t>(workspace) % 256 != 0) return CUBLAS_STATUS_INVALID_VALUE;
  const EmulatedLayout wl = *la, xl = *lb, yl = *ld;
  moebius::emulation::queue(stream, [=] {
    for (size_t i = 0; i < workspace_bytes; i += 4096) static_cast<std::byte*>(workspace)[i] = std::byte{0xff};  // it is all there
    const auto* w = static_cast<const moebius::bf16*>(a);
    const auto* x = static_cast<const moebius::bf16*>(b);
    for (uint64_t r = 0; r < yl.columns; ++r)
      for (uint64_t n = 0; n < yl.rows; ++n) {
        float sum = 0;
        for (uint64_t k = 0; k < wl.rows; ++k)
          sum += moebius::to_float(w[n * static_cast<uint64_t>(wl.ld) + k]) * moebius::to_float(x[r * static_cast<uint64_t>(xl.ld) + k]);
        static_cast<float*>(d)[r * static_cast<uint64_t>(yl.ld) + n] = sum;
      }
  });
  return CUBLAS_STATUS_SUCCESS;
}
