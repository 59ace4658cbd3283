// One pass between two convolutions: residual (+)= source, with the group sums of the result.
//
// A row's sums depend on that row only: channels are summed over chunks of pixels in fp32, chunks in double and in
// order, so neither threads nor how an image is cut into strips changes a bit.
#include "cpu/residual_moments.h"

#include "cpu/simd.h"

namespace gear::GEAR_ISA {
namespace {

constexpr int kBlock = 4;            // vectors of channels per pass over the row
constexpr std::int64_t kChunk = 64;  // pixels whose sums stay in fp32
constexpr int kMaxLanes = kBlock * kLanes;

template <class Source>
struct Row {
  const ResidualRows& call;
  std::int64_t row;

  const Source* source(std::int64_t pixel) const {
    const Source* base = static_cast<const Source*>(call.source);
    if (call.phase_offset < 0) return base + (row * call.width + pixel) * call.channels;
    const std::int64_t dy = row & 1, dx = pixel & 1;
    const std::int64_t y = row / 2 + dy * call.phase_offset, x = pixel / 2 + dx * call.phase_offset;
    return base + ((y * (call.width / 2 + call.phase_offset) + x) * 4 + 2 * dy + dx) * call.channels;
  }
};

// Pixels [first, last), kVecs vectors of channels from `channel` on; their sums go to `totals`.
template <int kVecs, bool kWrite, bool kAccumulate, class Source>
void chunk(const Row<Source>& row, std::int64_t channel, std::int64_t first, std::int64_t last, double* totals) {
  Vec sums[kVecs], squares[kVecs];
  for (int v = 0; v < kVecs; ++v) sums[v] = squares[v] = zero();
  float* residual = row.call.residual;
  if constexpr (kWrite) residual += (row.row * row.call.width + first) * row.call.channels + channel;
  for (std::int64_t pixel = first; pixel < last; ++pixel, residual += kWrite ? row.call.channels : 0) {
    const Source* source = row.source(pixel) + channel;
    for (int v = 0; v < kVecs; ++v) {
      Vec x = load(source + v * kLanes);
      if constexpr (kAccumulate) x = add(x, load(residual + v * kLanes));
      if constexpr (kWrite) store(residual + v * kLanes, x);
      sums[v] = add(sums[v], x);
      squares[v] = fma(x, x, squares[v]);
    }
  }
  float lanes[kLanes];
  for (int v = 0; v < kVecs; ++v) {
    store(lanes, sums[v]);
    for (int i = 0; i < kLanes; ++i) totals[v * kLanes + i] += lanes[i];
    store(lanes, squares[v]);
    for (int i = 0; i < kLanes; ++i) totals[kMaxLanes + v * kLanes + i] += lanes[i];
  }
}

template <int kVecs, bool kWrite, bool kAccumulate, class Source>
void channel_block(const Row<Source>& row, std::int64_t channel) {
  double totals[2 * kMaxLanes] = {};
  for (std::int64_t first = 0; first < row.call.width; first += kChunk) {
    const std::int64_t last = first + kChunk < row.call.width ? first + kChunk : row.call.width;
    chunk<kVecs, kWrite, kAccumulate>(row, channel, first, last, totals);
  }
  const std::int64_t per_group = row.call.channels / row.call.groups;
  for (int i = 0; i < kVecs * kLanes; ++i) {
    double* moments = row.call.moments + (row.row * row.call.groups + (channel + i) / per_group) * 2;
    moments[0] += totals[i];
    moments[1] += totals[kMaxLanes + i];
  }
}

template <bool kWrite, bool kAccumulate, class Source>
void whole_row(const Row<Source>& row) {
  for (std::int64_t i = 0; i < row.call.groups * 2; ++i) row.call.moments[row.row * row.call.groups * 2 + i] = 0;
  std::int64_t channel = 0;
  for (; channel + kMaxLanes <= row.call.channels; channel += kMaxLanes)
    channel_block<kBlock, kWrite, kAccumulate>(row, channel);
  for (; channel < row.call.channels; channel += kLanes) channel_block<1, kWrite, kAccumulate>(row, channel);
}

template <class Source>
void by_mode(const ResidualRows& call, std::int64_t index) {
  const Row<Source> row{call, index};
  if (call.residual == nullptr)
    whole_row<false, false>(row);
  else if (call.accumulate)
    whole_row<true, true>(row);
  else
    whole_row<true, false>(row);
}

}  // namespace

void residual_moments_row(const ResidualRows& call, std::int64_t row) {
  call.source_type == 0 ? by_mode<float>(call, row) : by_mode<bf16>(call, row);
}

}  // namespace gear::GEAR_ISA
