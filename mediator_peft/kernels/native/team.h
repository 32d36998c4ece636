// Running a kernel in several threads.
#pragma once

#include <cstdint>

// A kernel takes chunks from `next` until none is left.
using Kernel = void (*)(const void* call, int64_t* next);

// Run a kernel in up to `num_threads` threads, this one included.
void run_in_threads(Kernel kernel, const void* call, int num_threads);

// The function with which the OpenMP runtime of the host program starts a team (GOMP_parallel), or null: then threads of
// our own are used. Its threads are preferred: a second pool beside it fights with it for the cores.
using HostTeam = void (*)(void (*)(void*), void*, unsigned, unsigned);
void set_host_team(HostTeam team);
