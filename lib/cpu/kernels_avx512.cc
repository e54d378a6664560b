#define MOEBIUS_ISA moebius::avx512
#define MOEBIUS_ISA_NAME "avx512"
#include "lib/cpu/isa_avx512.h"
//
#include "lib/cpu/kernels.h"
