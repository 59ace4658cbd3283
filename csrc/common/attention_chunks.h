// Index maps and the merge of decode attention, for the host and the device.
//
// Entries 0 … t + 1 of a slot (0 is the collapsed prefix, t + 1 the new token) are cut into fixed chunks of 64. A chunk
// gives (max, sum, accumulator) of its softmax, and chunks are merged in ascending order. Several blocks may share the
// chunks of a head; since each chunk is the same work wherever it is done, and the merge is the same sequence, bits
// depend neither on the number of blocks nor on the batch.
#pragma once

#include <cstdint>

#include "common/exp.h"
#include "common/host_device.h"

namespace gear {

constexpr int kChunkEntries = 64;

GEAR_HD constexpr int chunk_count(int entries) { return (entries + kChunkEntries - 1) / kChunkEntries; }

// Chunks c = share, share + shares … belong to one of `shares` blocks; the others have none.
GEAR_HD constexpr int sharing_blocks(int chunks, int shares) { return chunks < shares ? chunks : shares; }
GEAR_HD constexpr int owner_of_chunk(int chunk, int shares) { return chunk % shares; }

// Floats of one stored chunk: the accumulator, then max and sum.
GEAR_HD constexpr std::int64_t stored_chunk_floats(int head_dim) { return head_dim + 2; }
GEAR_HD constexpr std::int64_t stored_chunk(std::int64_t row, std::int64_t head, std::int64_t chunk, int n_head,
                                            int max_chunks, int head_dim) {
  return ((row * n_head + head) * max_chunks + chunk) * stored_chunk_floats(head_dim);
}

struct SoftmaxState {
  float max, sum;
};

// What a merge multiplies the accumulators so far and the new chunk's with.
struct SoftmaxScales {
  float old_scale, new_scale;
};

// Both maxima are finite or -inf, one of them finite.
GEAR_HD inline SoftmaxScales merge_chunk(SoftmaxState& state, SoftmaxState chunk) {
  const float top = state.max > chunk.max ? state.max : chunk.max;
  const SoftmaxScales scales{exp_fp32(state.max - top), exp_fp32(chunk.max - top)};
  state.sum = state.sum * scales.old_scale + chunk.sum * scales.new_scale;
  state.max = top;
  return scales;
}

GEAR_HD inline float merge_value(SoftmaxScales scales, float old_value, float new_value) {
  return old_value * scales.old_scale + new_value * scales.new_scale;
}

}  // namespace gear
