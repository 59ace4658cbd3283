// codebook_quantize on AMX tile registers: proposals from bf16 products, everything they leave open decided in fp32.
//
// The score of a code is one bf16 inner product of 2-byte slots: three terms when they fit one tile step of 32, nearly
// fp32's accuracy, one term otherwise (common/codebook_bound.h).
//
// A tile product gives the scores of 16 codes for 16 rows; only their maximum over the 16 codes (a granule) is kept, K
// / 16 numbers per row. Then, per row: granules within the bf16 bound of the row's best are scored in fp32; if more
// than one code is within fp32's bound, the official formula decides (codebook_quantize_exact.h).
//
// Error of a bf16 proposal: split_error, and for the hardware's sum of m slots m u (P + E / 2) with a margin of 1.04
// for the splitting; it flushes denormal numbers, less than 2^-125 for each of its operations.
#include "cpu/codebook_quantize.h"

#if defined(GEAR_ISA_avx512)

#include <cstring>

#include "cpu/codebook_quantize_exact.h"
#include "cpu/simd.h"

#define GEAR_AMX __attribute__((target("amx-tile,amx-bf16")))

namespace gear::avx512 {
namespace {

using gear::codebook_quantize::kGranule;
using gear::codebook_quantize::kMostCandidates;
using gear::codebook_quantize::kStepSlots;

static_assert(kGranule == kLanes, "a granule is one tile of codes, a tile column one row of z");

bool three_terms(const QuantizeProblem& problem) {
  return 3 * problem.d + (problem.metric == Metric::l2 ? 3 : 0) <= kStepSlots;
}

Vec round_to_bf16(Vec x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

void store_high_halves(uint16_t* p, Vec x, __mmask16 lanes) {
  _mm512_mask_cvtepi32_storeu_epi16(p, lanes, _mm512_srli_epi32(_mm512_castps_si512(x), 16));
}

// |x|^2, |x - hi|^2 and |x - hi - lo|^2 of 16 vectors.
struct SplitSquares {
  Vec whole, low, rest;
};

// Splits `count` <= 16 vectors into the hi and lo slots of `slots` [16][n_slots]; lo_first: the order of z.
SplitSquares split(const float* x, int64_t count, int64_t d, bool lo_first, bool terms3, uint16_t* slots,
                   int64_t n_slots) {
  Vec whole[kLanes], low[kLanes], rest[kLanes];
  for (int64_t v = 0; v < kLanes; ++v) {
    whole[v] = low[v] = rest[v] = zero();
    if (v >= count) continue;
    uint16_t* out = slots + v * n_slots;
    for (int64_t i = 0; i < d; i += kLanes) {
      const auto lanes = static_cast<__mmask16>(d - i >= kLanes ? 0xffffu : (1u << (d - i)) - 1);
      const Vec value = _mm512_maskz_loadu_ps(lanes, x + v * d + i);
      const Vec hi = round_to_bf16(value), remainder = sub(value, hi);
      store_high_halves(out + i, hi, lanes);
      whole[v] = fma(value, value, whole[v]);
      low[v] = fma(remainder, remainder, low[v]);
      if (terms3) {
        const Vec lo = round_to_bf16(remainder), left = sub(remainder, lo);
        store_high_halves(out + d + i, lo_first ? lo : hi, lanes);
        store_high_halves(out + 2 * d + i, lo_first ? hi : lo, lanes);
        rest[v] = fma(left, left, rest[v]);
      }
    }
  }
  return {sum_each(whole), sum_each(low), terms3 ? sum_each(rest) : zero()};
}

// Three bf16 pieces whose sum is x to 24 bits.
void split_bias(float x, uint16_t* slots) {
  for (int piece = 0; piece < 3; ++piece) {
    const bf16 rounded = from_float<bf16>(x);
    slots[piece] = rounded.bits;
    x -= to_float(rounded);
  }
}

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The largest of the 16 vectors at p.
inline Vec max_of_rows(const float* p) {
  Vec best[4];
  for (int i = 0; i < 4; ++i) best[i] = max(load(p + i * kLanes), load(p + (i + 4) * kLanes));
  for (int i = 0; i < 4; ++i) best[i] = max(best[i], max(load(p + (i + 8) * kLanes), load(p + (i + 12) * kLanes)));
  return max(max(best[0], best[1]), max(best[2], best[3]));
}

// Maxima of two granules of codes for all rows of the block. codes: [32][n_slots]; rows: tiles of [step][16][16] pairs;
// maxima: [tile][granules][16], at the first granule. The products of one pair of row tiles are reduced while the tile
// unit works on the next pair.
template <bool kOneStep>
GEAR_AMX void propose_pair(const uint16_t* codes, int64_t n_slots, const uint32_t* rows, int64_t tiles, float* maxima,
                           int64_t tile_stride) {
  alignas(64) float products[2][4][kLanes * kLanes];
  const int64_t steps = n_slots / kStepSlots, tile_pairs = steps * kLanes * kLanes, stride = n_slots * 2;
  const uint16_t* second = codes + kGranule * n_slots;
  if constexpr (kOneStep) {
    _tile_loadd(4, codes, 64);
    _tile_loadd(5, second, 64);
  }
  for (int64_t tile = 0; tile <= tiles; tile += 2) {
    if (tile < tiles) {
      const uint32_t* first_rows = rows + tile * tile_pairs;
      float (*out)[kLanes * kLanes] = products[tile / 2 % 2];
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t step = 0; step < (kOneStep ? 1 : steps); ++step) {
        _tile_loadd(6, first_rows + step * kLanes * kLanes, 64);
        _tile_loadd(7, first_rows + tile_pairs + step * kLanes * kLanes, 64);
        if constexpr (!kOneStep) {
          _tile_loadd(4, codes + step * kStepSlots, stride);
          _tile_loadd(5, second + step * kStepSlots, stride);
        }
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, out[0], 64);
      _tile_stored(1, out[1], 64);
      _tile_stored(2, out[2], 64);
      _tile_stored(3, out[3], 64);
    }
    if (tile > 0) {
      const float (*done)[kLanes * kLanes] = products[(tile / 2 - 1) % 2];
      float* kept = maxima + (tile - 2) * tile_stride;
      store(kept, max_of_rows(done[0]));
      store(kept + kLanes, max_of_rows(done[1]));
      store(kept + tile_stride, max_of_rows(done[2]));
      store(kept + tile_stride + kLanes, max_of_rows(done[3]));
    }
  }
}

// fp32 scores of a granule's codes, summed across lanes: within fp32_proposal_slack, in an order of their own.
Vec granule_scores(const QuantizeProblem& problem, const float* z, int64_t first) {
  const int64_t d = problem.d;
  const int64_t count = problem.k - first < kGranule ? problem.k - first : kGranule;
  Vec sums[kLanes];
  for (int64_t c = 0; c < kLanes; ++c) {
    sums[c] = zero();
    const float* e = problem.codebook + (first + (c < count ? c : count - 1)) * d;
    for (int64_t i = 0; i < d; i += kLanes) {
      const auto lanes = static_cast<__mmask16>(d - i >= kLanes ? 0xffffu : (1u << (d - i)) - 1);
      sums[c] = fma(_mm512_maskz_loadu_ps(lanes, z + i), _mm512_maskz_loadu_ps(lanes, e + i), sums[c]);
    }
  }
  const auto real = static_cast<__mmask16>((1u << count) - 1);
  Vec scores = sum_each(sums);
  if (problem.metric == Metric::l2) scores = fma(splat(-0.5f), _mm512_maskz_loadu_ps(real, problem.e2 + first), scores);
  return _mm512_mask_mov_ps(splat(-__builtin_inff()), real, scores);
}

// The official index of a row, from the granules that its proposals left open. scores: [count][16] scratch.
int64_t decide(const QuantizeProblem& problem, int64_t row, double slack, const int32_t* granules, int64_t count,
               float* scores) {
  const float* z = problem.z + row * problem.d;
  Vec best = splat(-__builtin_inff());
  for (int64_t g = 0; g < count; ++g) {
    const Vec found = granule_scores(problem, z, granules[g] * kGranule);
    store(scores + g * kLanes, found);
    best = max(best, found);
  }
  const Vec threshold = splat(candidate_threshold(_mm512_reduce_max_ps(best), slack));
  const auto for_candidates = [&](auto visit) {
    for (int64_t g = 0; g < count; ++g)
      for (uint32_t lanes = _mm512_cmp_ps_mask(load(scores + g * kLanes), threshold, _CMP_GE_OQ); lanes != 0;
           lanes &= lanes - 1)
        visit(granules[g] * kGranule + __builtin_ctz(lanes));
  };
  int64_t candidates = 0, code = 0;
  for_candidates([&](int64_t candidate) {
    ++candidates;
    code = candidate;
  });
  if (candidates == 1) return code;
  Best winner(problem, row);
  for_candidates([&](int64_t candidate) { winner.offer(candidate); });
  if (problem.metric == Metric::inner_product) for_candidates([&](int64_t candidate) { winner.offer_tie(candidate); });
  winner.settle_ties();
  return winner.code();
}

// The parts of a block's scratch.
struct Scratch {
  float* maxima;      // [tiles][granules][16]
  float* scores;      // [granules][16]
  int32_t* open;      // [16][granules]: granules left open, per row of one tile
  uint32_t* rows;     // [tiles][steps][16][16] pairs of slots
  uint16_t* staging;  // [16][n_slots]
};

// Bound of each row: 2 (p + f) with the bf16 proposal's p, and the fp32 one's for the second look.
struct RowBounds {
  double bf16[kLanes], fp32[kLanes];
};

// Splits 16 rows from `first` on (those past `last` are zeros) into the tile at `pairs`; returns their error bounds.
RowBounds prepare_rows(const QuantizeProblem& problem, const TiledCodebook& codes, int64_t first, int64_t last,
                       uint16_t* staging, uint32_t* pairs) {
  const int64_t d = problem.d, n_slots = codes.n_slots, count = last - first < kLanes ? last - first : kLanes;
  const bool terms3 = three_terms(problem), l2 = problem.metric == Metric::l2;
  std::memset(staging, 0, static_cast<size_t>(kLanes * n_slots) * 2);
  const SplitSquares norms = split(problem.z + (count > 0 ? first * d : 0), count, d, true, terms3, staging, n_slots);
  for (int64_t v = 0; l2 && v < kLanes; ++v)
    for (int64_t piece = 0; piece < 3; ++piece) staging[v * n_slots + (terms3 ? 3 : 1) * d + piece] = 0x3f80;  // 1
  for (int64_t v = 0; v < kLanes; ++v)
    for (int64_t pair = 0; pair < n_slots / 2; ++pair)
      std::memcpy(pairs + pair * kLanes + v, staging + v * n_slots + 2 * pair, 4);
  float whole[kLanes], low[kLanes], rest[kLanes];
  store(whole, norms.whole);
  store(low, norms.low);
  store(rest, norms.rest);
  const SplitNorms e = split_norms(codes.max_whole, codes.max_low, codes.max_rest);
  const int width = static_cast<int>(d);
  RowBounds bounds;
  for (int64_t v = 0; v < kLanes; ++v) {
    const SplitNorms z = split_norms(whole[v], low[v], rest[v]);
    const double z2 = z.whole * z.whole, e2 = e.whole * e.whole;
    const double sum_error = 1.04 * kUnitRoundoff * static_cast<double>(n_slots + 4) * (z.whole * e.whole + e2 / 2);
    bounds.bf16[v] = proposal_slack(width, l2, split_error(terms3 ? 3 : 1, z, e) + sum_error, z2, e2) +
                     static_cast<double>(n_slots) * 0x1p-123;
    bounds.fp32[v] = fp32_proposal_slack(width, l2, z2, e2);
  }
  return bounds;
}

// Lists the granules whose maximum lies within the bound of the row's best; false if a row has no finite bound.
// open: [16][granules].
bool list_open(const float* maxima, int64_t granules, const RowBounds& bounds, int64_t rows, int32_t* open,
               int64_t* counts) {
  Vec best = load(maxima);
  for (int64_t g = 1; g < granules; ++g) best = max(best, load(maxima + g * kLanes));
  float top[kLanes], threshold[kLanes];
  store(top, best);
  for (int64_t v = 0; v < kLanes; ++v) {
    counts[v] = 0;
    threshold[v] = __builtin_inff();
    if (v >= rows) continue;
    if (!std::isfinite(top[v]) || !(bounds.bf16[v] <= kLargestBound)) return false;
    threshold[v] = candidate_threshold(top[v], bounds.bf16[v]);
  }
  const Vec lowest = load(threshold);
  for (int64_t g = 0; g < granules; ++g)
    for (uint32_t lanes = _mm512_cmp_ps_mask(load(maxima + g * kLanes), lowest, _CMP_GE_OQ); lanes != 0;
         lanes &= lanes - 1) {
      const int v = __builtin_ctz(lanes);
      open[v * granules + counts[v]++] = static_cast<int32_t>(g);
    }
  return true;
}

}  // namespace

int64_t codebook_tile_slots(const QuantizeProblem& problem) {
  const int64_t used = (three_terms(problem) ? 3 : 1) * problem.d + (problem.metric == Metric::l2 ? 3 : 0);
  return (used + kStepSlots - 1) / kStepSlots * kStepSlots;
}

void codebook_tile_pack(const QuantizeProblem& problem, int64_t granule, int64_t n_slots, uint16_t* slots,
                        float* max_norms) {
  const int64_t first = granule * kGranule, d = problem.d;
  const int64_t count = problem.k - first < kGranule ? problem.k - first : kGranule;
  const bool terms3 = three_terms(problem);
  std::memset(slots, 0, static_cast<size_t>(kGranule * n_slots) * 2);
  if (count > 0) {
    const SplitSquares norms = split(problem.codebook + first * d, count, d, false, terms3, slots, n_slots);
    const Vec squares[3] = {norms.whole, norms.low, norms.rest};
    for (int i = 0; i < 3; ++i) {
      // A NaN stays: it is among the lanes that are not <= the largest.
      const float largest = _mm512_reduce_max_ps(squares[i]);
      const bool nan = _mm512_cmp_ps_mask(squares[i], squares[i], _CMP_UNORD_Q) != 0;
      max_norms[i] = nan ? __builtin_nanf("") : largest;
    }
    for (int64_t c = 0; problem.metric == Metric::l2 && c < count; ++c)
      split_bias(-0.5f * problem.e2[first + c], slots + c * n_slots + (terms3 ? 3 : 1) * d);
    // Padding repeats the last code, so that it never raises its granule's maximum.
    for (int64_t c = count; c < kGranule; ++c)
      std::memcpy(slots + c * n_slots, slots + (count - 1) * n_slots, static_cast<size_t>(n_slots) * 2);
  } else {
    max_norms[0] = max_norms[1] = max_norms[2] = 0;
  }
}

int64_t codebook_tile_scratch_bytes(const TiledCodebook& codes, int64_t block_rows) {
  const int64_t granules = codes.granules;
  return block_rows * granules * 4 + 2 * granules * kLanes * 4 + block_rows * codes.n_slots * 2 +
         kLanes * codes.n_slots * 2;
}

GEAR_AMX bool codebook_tile_rows(const QuantizeProblem& problem, const TiledCodebook& codes, int64_t first,
                                 int64_t last, int64_t block_rows, char* memory) {
  const int64_t d = problem.d, n_slots = codes.n_slots, granules = codes.granules;
  const int64_t tiles = (last - first + 2 * kLanes - 1) / (2 * kLanes) * 2, tile_stride = granules * kLanes;
  Scratch scratch;
  scratch.maxima = reinterpret_cast<float*>(memory);
  scratch.rows = reinterpret_cast<uint32_t*>(scratch.maxima + block_rows * granules);
  scratch.staging = reinterpret_cast<uint16_t*>(scratch.rows + block_rows * n_slots / 2);
  scratch.scores = reinterpret_cast<float*>(scratch.staging + kLanes * n_slots);
  scratch.open = reinterpret_cast<int32_t*>(scratch.scores + granules * kLanes);
  RowBounds bounds[gear::codebook_quantize::kMostTileRows / kLanes];
  for (int64_t tile = 0; tile < tiles; ++tile)
    bounds[tile] = prepare_rows(problem, codes, first + tile * kLanes, last, scratch.staging,
                                scratch.rows + tile * kLanes * n_slots / 2);
  const TileConfig config;
  _tile_loadconfig(&config);
  for (int64_t granule = 0; granule < granules; granule += 2)
    (n_slots == kStepSlots ? &propose_pair<true>
                           : &propose_pair<false>)(codes.slots + granule * kGranule * n_slots, n_slots, scratch.rows,
                                                   tiles, scratch.maxima + granule * kLanes, tile_stride);
  _tile_release();

  const int64_t real_granules = (problem.k + kGranule - 1) / kGranule;  // `granules` is rounded up to pairs
  int64_t budget = kMostCandidates * (last - first) + 2 * granules;
  for (int64_t tile = 0; tile * kLanes < last - first; ++tile) {
    const int64_t row = first + tile * kLanes, rows = last - row < kLanes ? last - row : kLanes;
    int64_t counts[kLanes];
    if (!list_open(scratch.maxima + tile * tile_stride, real_granules, bounds[tile], rows, scratch.open, counts))
      return false;
    for (int64_t v = 0; v < rows; ++v) budget -= counts[v];
    if (budget < 0) return false;
    for (int64_t v = 0; v < rows; ++v) {
      const int64_t code =
          decide(problem, row + v, bounds[tile].fp32[v], scratch.open + v * real_granules, counts[v], scratch.scores);
      problem.indices[row + v] = code;
      std::memcpy(problem.quantized + (row + v) * d, problem.codebook + code * d, static_cast<size_t>(d) * 4);
    }
  }
  return true;
}

}  // namespace gear::avx512

#endif
