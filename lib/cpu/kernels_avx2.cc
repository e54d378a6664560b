#define MOEBIUS_ISA moebius::avx2
#define MOEBIUS_ISA_NAME "avx2"
#include "lib/cpu/isa_avx2.h"
namespace MOEBIUS_ISA { using Vec = Avx2; }
#include "lib/cpu/kernels.h"
