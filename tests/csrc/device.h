// Arrays of exactly their size where kernels can reach them: on the GPU, or on the heap for the emulated kernels.
#pragma once

#include <cstddef>
#include <cstring>
#include <new>
#include <vector>

#include "common/cuda_check.h"
#ifdef GEAR_EMULATE_CUDA
#include "cuda_emulation.h"
#endif

namespace gear::emulated {

template <class T>
class Device {
 public:
  explicit Device(std::size_t n) : size_(n) { allocate(); }
  explicit Device(const std::vector<T>& values) : Device(values.size()) {
    if (size_ == 0) return;
#ifdef GEAR_EMULATE_CUDA
    std::memcpy(data_, values.data(), size_ * sizeof(T));
#else
    cuda::check(cudaMemcpy(data_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
#endif
  }
  ~Device() {
#ifdef GEAR_EMULATE_CUDA
    ::operator delete(data_, kAlignment);
#else
    cudaFree(data_);
#endif
  }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  T* data() const { return data_; }

  // What is there now, after all work on the device.
  std::vector<T> values() const {
    std::vector<T> found(size_);
    if (size_ == 0) return found;
#ifdef GEAR_EMULATE_CUDA
    std::memcpy(found.data(), data_, size_ * sizeof(T));
#else
    cuda::check(cudaMemcpy(found.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
#endif
    return found;
  }

 private:
#ifdef GEAR_EMULATE_CUDA
  static constexpr std::align_val_t kAlignment{256};  // as cudaMalloc's
  void allocate() { data_ = static_cast<T*>(::operator new(size_ * sizeof(T), kAlignment)); }
#else
  void allocate() {
    if (size_ != 0) cuda::check(cudaMalloc(reinterpret_cast<void**>(&data_), size_ * sizeof(T)), "cudaMalloc");
  }
#endif

  std::size_t size_;
  T* data_ = nullptr;
};

// The kernel before the next one wrote this array, and had not ended when the next one started.
template <class T>
void arrive_late([[maybe_unused]] const Device<T>& array, [[maybe_unused]] std::size_t size) {
#ifdef GEAR_EMULATE_CUDA
  emulation::arrive_late(array.data(), size * sizeof(T));
#endif
}

// Whether a kernel asked for something of its own while the one before was still running; unknown on a GPU.
inline bool has_asked_ahead() {
#ifdef GEAR_EMULATE_CUDA
  return emulation::asked_ahead.exchange(0) > 0;
#else
  return true;
#endif
}

}  // namespace gear::emulated
