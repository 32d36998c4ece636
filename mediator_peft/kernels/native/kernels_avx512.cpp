#include "isa_avx512.h"
#include "kernels.inl"

TABLE(table_avx512, "avx512");
