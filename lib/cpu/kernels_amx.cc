#define MOEBIUS_ISA moebius::amx
#define MOEBIUS_ISA_NAME "amx"
#include "lib/cpu/isa_amx.h"
namespace MOEBIUS_ISA { using Vec = Matrix<Avx512, Amx>; }
#include "lib/cpu/kernels.h"
