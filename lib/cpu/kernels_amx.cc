#define MOEBIUS_ISA moebius::amx
#define MOEBIUS_ISA_NAME "amx"
#include "lib/cpu/isa_amx.h"
//
#include "lib/cpu/kernels.h"
