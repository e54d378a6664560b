#define MOEBIUS_ISA moebius::portable
#define MOEBIUS_ISA_NAME "portable"
#include "lib/cpu/isa_portable.h"
namespace MOEBIUS_ISA { using Vec = Portable; }
#include "lib/cpu/kernels.h"
