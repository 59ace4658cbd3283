// Decode attention on a GPU: one block per row, head and share of the keys.
//
// State: run under the CPU emulation only (tests/csrc/cuda_emulation.h), not on hardware yet.
//
// Keys are cut into fixed chunks of 64 (common/attention_chunks.h). A chunk is read by all four warps at once: 4 or 8
// lanes hold a key in words of 16 bytes, so that a block has a whole chunk of keys and values in flight. At many rows
// one block walks all chunks of its head; at few rows several share them, store each chunk's (max, sum, accumulator),
// and the last to arrive merges them in order (the idea of flash decoding). The new key and value are attended to from
// shared memory, as they will be read from the cache later, and written by the block whose chunk they belong to.
#include "cuda/decode_attention.h"

#include <cstdint>
#include <stdexcept>

#include "common/attention_chunks.h"
#include "cuda/decode_attention_row.cuh"
#include "cuda/platform.cuh"

namespace gear::cuda {
namespace {

using namespace attention;

// One chunk: its (max, sum), the same in all threads, and in values[i] its accumulator of element threadIdx.x +
// kThreads i.
template <class T, int kLanes, int kWords>
__device__ SoftmaxState attend_chunk(const Attend& call, const Head& at, int chunk, float bias, Shared& shared,
                                     const float (&q)[kWords * 16 / sizeof(T)], float (&values)[2]) {
  constexpr int kEach = 16 / sizeof(T), kKeys = 32 / kLanes, kPasses = kWarpKeys / kKeys;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = lane % kLanes;
  const int row_words = (call.head_dim + kEach - 1) / kEach, first = chunk * kChunkEntries;
  const auto entry_of = [&](int pass) { return first + warp * kWarpKeys + pass * kKeys + lane / kLanes; };
  const auto word_of = [&](const unsigned char* cache, const uint4* fresh, int entry, int word) {
    if (entry >= at.n_entries || word >= row_words) return make_uint4(0, 0, 0, 0);
    if (entry == at.n_entries - 1) return fresh[word];
    return reinterpret_cast<const uint4*>(cache + at.offset + entry * call.entry_stride)[word];
  };
  const auto scale_of = [&](const float16* scales, float16 fresh, int entry) {
    if (entry >= at.n_entries) return 0.0f;
    return to_float(entry == at.n_entries - 1 ? fresh : scales[at.scale_offset + entry]);
  };

  // Values are asked for together with the keys, where there are registers for them.
  constexpr bool kEarly = kPasses * kWords <= 4;
  uint4 early[kEarly ? kPasses * kWords : 1];
  if constexpr (kEarly) {
#pragma unroll
    for (int i = 0; i < kPasses * kWords; ++i)
      early[i] = word_of(call.v_cache, shared.new_value, entry_of(i / kWords), part + i % kWords * kLanes);
  }

  // Scores of the warp's 16 keys. Entry 0 has no key, and its place is never read.
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int entry = entry_of(pass);
    float dot = 0.0f;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      float key[kEach];
      widen<T>(entry == 0 ? make_uint4(0, 0, 0, 0) : word_of(call.k_cache, shared.new_key, entry, part + w * kLanes),
               key);
#pragma unroll
      for (int i = 0; i < kEach; ++i) dot = fmaf(q[w * kEach + i], key[i], dot);
    }
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) dot += __shfl_xor_sync(kWarp, dot, distance);
    float score = dot * (1.0f / sqrtf(static_cast<float>(call.head_dim)));
    if constexpr (sizeof(T) == 1)
      if (entry > 0) score *= scale_of(call.k_scale, shared.new_k_scale, entry);
    if (part == 0)
      shared.scores[entry - first] = entry == 0 ? bias : entry < at.n_entries ? score : bits_float(-0x800000);
  }
  __syncthreads();

  // The chunk's softmax, by every warp for itself.
  const float mine[2] = {shared.scores[lane], shared.scores[lane + 32]};
  SoftmaxState state;
  state.max = warp_max(fmaxf(mine[0], mine[1]));
  state.sum = warp_sum(exp_fp32(mine[0] - state.max) + exp_fp32(mine[1] - state.max));

  // The weighted values of the warp's keys, then of the four warps in order.
  float sums[kWords * kEach] = {};
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int entry = entry_of(pass);
    float weight = exp_fp32(shared.scores[entry - first] - state.max);
    if constexpr (sizeof(T) == 1) weight *= scale_of(call.v_scale, shared.new_v_scale, entry);
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      float value[kEach];
      widen<T>(kEarly ? early[kEarly ? pass * kWords + w : 0]
                      : word_of(call.v_cache, shared.new_value, entry, part + w * kLanes),
               value);
#pragma unroll
      for (int i = 0; i < kEach; ++i) sums[w * kEach + i] = fmaf(weight, value[i], sums[w * kEach + i]);
    }
  }
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      float total = sums[w * kEach + i];
#pragma unroll
      for (int distance = kLanes; distance < 32; distance *= 2) total += __shfl_xor_sync(kWarp, total, distance);
      const int element = (part + w * kLanes) * kEach + i;
      if (lane < kLanes && element < call.head_dim) shared.parts[warp][element] = total;
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int element = threadIdx.x + kThreads * i;
    values[i] = 0.0f;
    if (element >= call.head_dim) continue;
    values[i] = shared.parts[0][element];
    for (int w = 1; w < kWarps; ++w) values[i] += shared.parts[w][element];
  }
  return state;
}

__device__ void merge(SoftmaxState& state, float (&totals)[2], bool is_first, SoftmaxState chunk,
                      const float (&values)[2]) {
  SoftmaxScales scales{0.0f, 1.0f};
  if (is_first) state = chunk;
  if (!is_first) scales = merge_chunk(state, chunk);
  for (int i = 0; i < 2; ++i) totals[i] = is_first ? values[i] : merge_value(scales, totals[i], values[i]);
}

__device__ void store_chunk(const Attend& call, const Head& at, int chunk, SoftmaxState state,
                            const float (&values)[2]) {
  float* to =
      call.stored + stored_chunk(at.row, at.head, chunk, call.n_head, chunk_count(call.num_entries), call.head_dim);
  for (int i = 0; i < 2; ++i)
    if (threadIdx.x + kThreads * i < call.head_dim) to[threadIdx.x + kThreads * i] = values[i];
  if (threadIdx.x == 0) {
    to[call.head_dim] = state.max;
    to[call.head_dim + 1] = state.sum;
  }
}

// Whether this block is the last of those that share the head; the others' chunks are then visible.
__device__ bool arrive(const Attend& call, const Head& at, int blocks, Shared& shared) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    int* arrived = call.arrived + at.row * call.n_head + at.head;
    shared.last = atomicAdd(arrived, 1) == blocks - 1;
    if (shared.last) *arrived = 0;  // for the next call
    __threadfence();
  }
  __syncthreads();
  return shared.last;
}

template <class T, int kLanes, int kWords>
__global__ void __launch_bounds__(kThreads) attend_kernel(const Attend call) {
  __shared__ Shared shared;
  const int share = blockIdx.x, shares = gridDim.x;
  Head at;
  at.head = blockIdx.y;
  at.row = blockIdx.z;
  at.kv_head = at.head / (call.n_head / call.n_kv_head);
  dependency_launch();
  std::int64_t slot;
  // With few rows a block waits for the cache: it asks for its first chunk before it waits for the projection. What the
  // tables say now is only a guess.
  if (shares > 1 && locate(call, at, slot) && at.exists) prefetch_chunk(call, at, share, sizeof(T));
  dependency_wait();
  const std::int64_t out = (static_cast<std::int64_t>(at.row) * call.n_head + at.head) * call.head_dim;
  if (!locate(call, at, slot)) {
    for (int i = threadIdx.x; i < call.head_dim && share == 0; i += kThreads)
      store_element(call.out, call.qkv_dtype, out + i, 0);
    return;
  }
  if (!at.exists) __trap();
  const int chunks = chunk_count(at.n_entries), blocks = sharing_blocks(chunks, shares);
  if (share >= blocks) return;
  if (shares == 1) prefetch_chunk(call, at, share, sizeof(T));

  // Phase 1: this token's query, key and value.
  if (threadIdx.x < 96) prepare<T>(call, at, threadIdx.x / 32, shared);
  __syncthreads();
  if (owner_of_chunk(chunks - 1, shares) == share && at.head % (call.n_head / call.n_kv_head) == 0)
    write_entry<T>(call, at, shared);

  // Phase 2: this block's chunks.
  constexpr int kEach = 16 / sizeof(T);
  float q[kWords * kEach];
#pragma unroll
  for (int i = 0; i < kWords * kEach; ++i)
    q[i] = shared.q[(threadIdx.x % kLanes + i / kEach * kLanes) * kEach + i % kEach];
  const float bias = call.prefix_bias[slot];
  SoftmaxState state{};
  float totals[2] = {};
  for (int chunk = share; chunk < chunks; chunk += shares) {
    float values[2];
    const SoftmaxState found = attend_chunk<T, kLanes, kWords>(call, at, chunk, bias, shared, q, values);
    if (blocks == 1) {
      merge(state, totals, chunk == 0, found, values);
    } else {
      store_chunk(call, at, chunk, found, values);
    }
  }

  // Phase 3: the last of several blocks merges all chunks.
  if (blocks > 1) {
    if (!arrive(call, at, blocks, shared)) return;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const float* from =
          call.stored + stored_chunk(at.row, at.head, chunk, call.n_head, chunk_count(call.num_entries), call.head_dim);
      const SoftmaxState found{__ldcg(from + call.head_dim), __ldcg(from + call.head_dim + 1)};
      float values[2] = {};
      for (int i = 0; i < 2; ++i)
        if (threadIdx.x + kThreads * i < call.head_dim) values[i] = __ldcg(from + threadIdx.x + kThreads * i);
      merge(state, totals, chunk == 0, found, values);
    }
  }
  for (int i = 0; i < 2; ++i) {
    const int element = threadIdx.x + kThreads * i;
    if (element < call.head_dim) store_element(call.out, call.qkv_dtype, out + element, totals[i] / state.sum);
  }
}

// The kernel whose lanes have room for a head of `words` 16-byte words.
template <class T>
void launch_for(int words, const Launch& at, const Attend& call) {
  const auto start = [&](auto kernel) { launch("decode_attention", at, kernel, call); };
  if (words <= 4) return start(attend_kernel<T, 4, 1>);
  if (words <= 8) return start(attend_kernel<T, 8, 1>);
  if (words <= 16) return start(attend_kernel<T, 8, 2>);
  if constexpr (sizeof(T) >= 2)
    if (words <= 32) return start(attend_kernel<T, 8, 4>);
  if constexpr (sizeof(T) == 4) return start(attend_kernel<T, 8, 8>);
}

}  // namespace

void decode_attention(const void* qkv, int qkv_dtype, std::int64_t qkv_stride, std::int64_t rows, std::int64_t n_head,
                      std::int64_t n_kv_head, std::int64_t head_dim, void* k_cache, void* v_cache, int cache_dtype,
                      std::int64_t num_slots, std::int64_t num_entries, std::int64_t slot_stride,
                      std::int64_t head_stride, std::int64_t entry_stride, void* k_scale, void* v_scale,
                      std::int64_t scale_slot_stride, std::int64_t scale_head_stride, const float* prefix_bias,
                      const std::int64_t* slots, const std::int64_t* positions, const float* rope, void* out,
                      std::int64_t splits, float* stored, int* arrived, void* stream) {
  if (rows == 0) return;
  if (head_dim > kMaxHeadDim || rows > 65535) throw std::invalid_argument("decode_attention: head or batch too large");
  const Dtype cache = static_cast<Dtype>(cache_dtype);
  const std::int64_t size = bytes_of(cache);
  const Attend call{qkv,
                    static_cast<Dtype>(qkv_dtype),
                    qkv_stride,
                    static_cast<int>(n_head),
                    static_cast<int>(n_kv_head),
                    static_cast<int>(head_dim),
                    static_cast<unsigned char*>(k_cache),
                    static_cast<unsigned char*>(v_cache),
                    num_slots,
                    static_cast<int>(num_entries),
                    slot_stride * size,
                    head_stride * size,
                    entry_stride * size,
                    static_cast<float16*>(k_scale),
                    static_cast<float16*>(v_scale),
                    scale_slot_stride,
                    scale_head_stride,
                    prefix_bias,
                    slots,
                    positions,
                    rope,
                    out,
                    stored,
                    arrived};
  const Launch at{dim3(static_cast<unsigned>(splits), static_cast<unsigned>(n_head), static_cast<unsigned>(rows)),
                  kThreads, 0, stream, true};
  const int words = static_cast<int>((head_dim * size + 15) / 16);
  switch (cache) {
    case Dtype::f32:
      return launch_for<float>(words, at, call);
    case Dtype::bf16:
      return launch_for<bfloat16>(words, at, call);
    case Dtype::f16:
      return launch_for<float16>(words, at, call);
    case Dtype::fp8:
      return launch_for<float8>(words, at, call);
  }
}

}  // namespace gear::cuda
