// Runs CUDA kernels on a CPU, their bodies unmodified: for tests, under the sanitizers too. See csrc/cuda/platform.cuh.
//
// A block's threads are threads of the host; blocks run one after the other. __syncthreads is a barrier of theirs, a
// warp's shuffles and tensor-core products exchange their operands through a buffer between two of its barriers. So a
// missing barrier is a data race, which ThreadSanitizer reports; a lane that leaves its warp's lock step deadlocks.
//
//   __shared__          is static, filled with 0xff before every block; dynamic shared memory is allocated per block at
//                       its exact size, so that AddressSanitizer sees an overrun
//   cp.async            destroys its destination at once and copies when it is waited for: a missing wait shows
//   mma                 exact products, summed in double and rounded once
//   fences              are implied: atomics acquire and release
//   dependency_wait     every thread of a dependent launch must have called it when it ends; arrive_late() keeps a
//                       kernel's input away until then
//   shared memory       a launch has what the smallest GPU would give it, by what it asked for
//
// GEAR_OMIT_BARRIER=file:line in the environment leaves out the __syncthreads, __syncwarp, copy_async_wait or
// dependency_wait there, to see that it would be missed.
//
// Not emulated: blocks that wait for each other, clusters, TMA, wgmma, and shuffles among part of a warp.
#pragma once

#include "cuda_emulation/copies_and_tensor_cores.h"
#include "cuda_emulation/functions.h"
#include "cuda_emulation/language.h"
#include "cuda_emulation/threads.h"
