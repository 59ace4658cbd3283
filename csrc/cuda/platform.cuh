// What every kernel includes in place of the CUDA headers: CUDA itself, or, with GEAR_EMULATE_CUDA defined, the host
// header that runs kernels on a CPU (tests/csrc/cuda_emulation.h). Both have the same functions under the same names,
// so that kernel bodies are compiled unmodified.
//
//   launch(name, {grid, block, shared, stream}, kernel, arguments...)   the launch syntax, checked
//   dynamic_shared<T>()                          the block's dynamic shared memory, 16-byte aligned
//   copy_async<16>(shared, global[, valid])      cp.async, 4, 8 or 16 bytes; only `valid` bytes are read, the rest is 0
//   copy_async_commit(), copy_async_wait<N>()    groups of copies; waits until at most N of the thread's are pending
//   mma_bf16, mma_f16, mma_tf32                  D += A B on tensor cores, m16n8k16, m16n8k16 and m16n8k8, fp32 sums
//   load_matrix_x1, _x2, _x4[_transposed]        ldmatrix, b16
//   barrier_sync(id, threads)                    a named barrier, id 1 … 15
//   prefetch_l2(global)                          asks for a line of 128 bytes
//   dependency_wait(), dependency_launch()       programmatic dependent launch (sm_90 and newer; no-ops elsewhere)
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/cuda_check.h"

#ifdef GEAR_EMULATE_CUDA
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>
#endif

namespace gear::cuda {

struct Launch {
  dim3 grid, block;
  std::size_t shared = 0;  // bytes of dynamic shared memory
  void* stream = nullptr;  // cudaStream_t
  bool dependent = false;  // may start before the kernel before it has ended; the kernel then calls dependency_wait()
};

// Bytes of shared memory that a block has without asking, and the most that a kernel has of static ones, which count
// among them (tests/test_cuda_build.py holds kernels to that).
constexpr std::size_t kUnaskedShared = 48 * 1024, kMostStaticShared = 8 * 1024;

constexpr bool has_to_ask_for_shared(const Launch& at) { return at.shared + kMostStaticShared > kUnaskedShared; }

#ifdef GEAR_EMULATE_CUDA

// Of the smallest GPU since sm_80.
inline int shared_memory_limit() { return 99 * 1024; }
inline int shared_memory_of_sm() { return 100 * 1024; }

template <class... Parameters, class... Arguments>
void launch(const char* name, const Launch& at, void (*kernel)(Parameters...), Arguments&&... arguments) {
  // Kernels that take all that there is leave 1 KiB for what is static.
  const std::size_t limit = has_to_ask_for_shared(at) ? static_cast<std::size_t>(shared_memory_limit()) - 1024
                                                      : kUnaskedShared - kMostStaticShared;
  emulation::run(at.grid, at.block, at.shared, limit, at.dependent, name,
                 [&] { kernel(static_cast<Parameters>(arguments)...); });
}

#else

inline int device_attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// Bytes of shared memory that a block can have, and that an SM has for all of its blocks.
inline int shared_memory_limit() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
inline int shared_memory_of_sm() { return device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor); }

inline bool has_dependent_launch() { return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9; }

template <class... Parameters, class... Arguments>
void launch(const char* name, const Launch& at, void (*kernel)(Parameters...), Arguments&&... arguments) {
  if (has_to_ask_for_shared(at))
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(at.shared)), name);
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};
  config.gridDim = at.grid;
  config.blockDim = at.block;
  config.dynamicSmemBytes = at.shared;
  config.stream = static_cast<cudaStream_t>(at.stream);
  if (at.dependent && has_dependent_launch()) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
}

#ifdef __CUDACC__

template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char gear_dynamic_shared[];
  return reinterpret_cast<T*>(gear_dynamic_shared);
}

__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes bypass L1, as weights and cache rows are read once.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, int valid = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global),
                 "n"(kBytes), "r"(valid)
                 : "memory");
  }
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void mma_bf16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_f16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The operands are fp32 bits, rounded to tf32 by the caller or truncated by the hardware.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// `row`: this lane's row of 16 bytes; lanes 8 m … 8 m + 7 name the rows of matrix m.
__device__ __forceinline__ void load_matrix_x1(std::uint32_t (&r)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrix_x2(std::uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrix_x4(std::uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrix_x2_transposed(std::uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrix_x4_transposed(std::uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void prefetch_l2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

__device__ __forceinline__ void dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void dependency_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#endif  // __CUDACC__
#endif  // GEAR_EMULATE_CUDA

}  // namespace gear::cuda
