#define MOEBIUS_ISA moebius::avx512bf16
#define MOEBIUS_ISA_NAME "avx512bf16"
#include "lib/cpu/isa_avx512.h"
namespace MOEBIUS_ISA { using Vec = Avx512; }
#include "lib/cpu/kernels.h"
