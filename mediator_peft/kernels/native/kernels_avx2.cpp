#include "isa_avx2.h"
#include "kernels.inl"

TABLE(table_avx2, "avx2");
