#include "isa_baseline.h"
#include "kernels.inl"

TABLE(table_baseline, "baseline");
