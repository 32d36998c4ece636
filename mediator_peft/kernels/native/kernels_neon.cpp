#include "isa_neon.h"
#include "kernels.inl"

TABLE(table_neon, "neon");
