// codebook_quantize on tensor cores: bf16 products propose, the official formula decides.
//
// pack_kernel writes the codebook as rows of bf16 slots (common/codebook_bound.h), in tiles of Shape::codes codes, and
// the largest norms per tile. In propose_kernel a warp holds 32 rows of z as operands in registers and walks over the
// tiles, which its block shares. A code's score is one accumulator; of those, a thread keeps for each of its rows one
// maximum per tile, over the quarter of the tile's codes that its lane sees (its "class": code / 2 % 4). Over the tiles
// it keeps the largest Shape::kept maxima with their tiles, and the largest of the others.
//
// So, per row and class: codes within the bound of the row's best lie in the tiles kept, unless one of the other maxima
// is within the bound too. The codes of the open (tile, class) pairs are scored by the official formula, one per lane.
// Rows with another maximum within the bound, or without a finite bound, go to a list for the exact kernel: of normally
// distributed vectors and 16384 codes none in 2048 at d = 8, 0.5% at d = 14 and 0.1% at d = 256 (inner product),
// counted in a simulation of these bounds.
//
// Keeping one running maximum and recovering the index later is the idea of Flash-KMeans and of cuVS' fusedL2NN.
#pragma once

#include "common/codebook_bound.h"
#include "common/narrow_floats.h"
#include "cuda/codebook_quantize.cuh"

namespace gear::cuda::codebook::tensor {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kFragments = 2;  // 16-row operands of z per warp
constexpr int kWarpRows = 16 * kFragments;
constexpr int kBlockRows = kWarps * kWarpRows;

// kSteps: tensor-core steps of 16 slots.
template <int kSteps>
struct Shape {
  static constexpr int slots = 16 * kSteps;
  static constexpr int codes = kSteps <= 2 ? 128 : 64;  // per tile
  static constexpr int stages = kSteps <= 2 ? 4 : 2;
  static constexpr int kept = kSteps <= 2 ? 2 : 4;  // maxima per row and class
  static constexpr int pack_threads = codes / 16 * 32;
  static constexpr int tile_values = codes * slots;
  static constexpr int staged_values = stages * tile_values, z_values = kWarps * 16 * slots;
  static constexpr int shared_bytes = 2 * (staged_values > z_values ? staged_values : z_values);
};

struct Packed {
  bfloat16* tiles;  // [tile][codes][slots]
  float* norms;     // [tile][3]: largest |e|^2, |e - hi|^2, |e - hi - lo|^2
  int count, terms;
};

struct Open {
  std::int64_t* rows;
  int* count;
};

// Unit (8 slots) u of row r lies where the 8 rows that ldmatrix reads fall into different banks.
template <int kSteps>
__device__ inline int unit_place(int row, int unit) {
  return row * (2 * kSteps) + (kSteps == 2 ? unit ^ (row / 2 % 4) : unit ^ (row % 8));
}

template <int kSteps>
__device__ inline void put(bfloat16* rows, int row, int slot, float value) {
  rows[unit_place<kSteps>(row, slot / 8) * 8 + slot % 8] = from_float<bfloat16>(value);
}

struct SquaredNorms {
  float whole, low, rest;
};

// Writes 16 vectors, from `first` on, as rows of slots; past the end the last one is repeated, so that it never raises
// a maximum. One warp; lanes l and l + 16 share vector l and get its norms.
template <int kSteps, bool kOfZ>
__device__ inline SquaredNorms pack_vectors(const Problem& p, int terms, std::int64_t first, bfloat16* rows) {
  const int lane = threadIdx.x % 32, row = lane % 16, half = lane / 16, d = p.d;
  const std::int64_t total = kOfZ ? p.n : p.k, index = first + row < total ? first + row : total - 1;
  const float* vector = (kOfZ ? p.z : p.codebook) + index * d;
  SquaredNorms norms{};
  for (int i = half; i < d; i += 2) {
    const float value = vector[i], hi = to_float(from_float<bfloat16>(value)), low = value - hi;
    const float lo = to_float(from_float<bfloat16>(low)), rest = low - lo;
    put<kSteps>(rows, row, i, hi);
    if (terms > 1) put<kSteps>(rows, row, d + i, kOfZ ? lo : hi);
    if (terms > 2) put<kSteps>(rows, row, 2 * d + i, kOfZ ? hi : lo);
    norms.whole = fmaf(value, value, norms.whole);
    norms.low = fmaf(low, low, norms.low);
    norms.rest = fmaf(rest, rest, norms.rest);
  }
  float bias = kOfZ || p.inner_product ? 0.0f : -0.5f * p.e2[index];
  for (int slot = terms * d; slot < 16 * kSteps; ++slot) {
    const bool is_bias = !p.inner_product && slot < terms * d + kBiasSlots;
    const float piece = to_float(from_float<bfloat16>(bias));
    if (slot % 2 == half) put<kSteps>(rows, row, slot, kOfZ ? (is_bias ? 1.0f : 0.0f) : is_bias ? piece : 0.0f);
    bias -= piece;
  }
  norms.whole += __shfl_xor_sync(kAllLanes, norms.whole, 16);
  norms.low += __shfl_xor_sync(kAllLanes, norms.low, 16);
  norms.rest += __shfl_xor_sync(kAllLanes, norms.rest, 16);
  return norms;
}

// max that keeps a NaN.
__device__ inline float larger(float a, float b) { return b > a || b != b ? b : a; }

__device__ inline SquaredNorms larger(SquaredNorms a, SquaredNorms b) {
  return {larger(a.whole, b.whole), larger(a.low, b.low), larger(a.rest, b.rest)};
}

__device__ inline SquaredNorms largest_of_warp(SquaredNorms norms) {
  for (int distance = 16; distance > 0; distance /= 2)
    norms = larger(norms,
                   {__shfl_xor_sync(kAllLanes, norms.whole, distance), __shfl_xor_sync(kAllLanes, norms.low, distance),
                    __shfl_xor_sync(kAllLanes, norms.rest, distance)});
  return norms;
}

// A block per tile.
template <int kSteps>
__global__ void __launch_bounds__(Shape<kSteps>::pack_threads) pack_kernel(Problem p, Packed packed, Open open) {
  constexpr int kPackWarps = Shape<kSteps>::pack_threads / 32;
  __shared__ SquaredNorms shared[kPackWarps];
  const int warp = threadIdx.x / 32, tile = static_cast<int>(blockIdx.x);
  if (tile == 0 && threadIdx.x == 0) *open.count = 0;
  bfloat16* rows = packed.tiles + static_cast<std::int64_t>(tile) * Shape<kSteps>::tile_values;
  const SquaredNorms found = largest_of_warp(pack_vectors<kSteps, false>(
      p, packed.terms, tile * Shape<kSteps>::codes + warp * 16, rows + warp * 16 * Shape<kSteps>::slots));
  if (threadIdx.x % 32 == 0) shared[warp] = found;
  __syncthreads();
  if (threadIdx.x != 0) return;
  SquaredNorms norms = shared[0];
  for (int i = 1; i < kPackWarps; ++i) norms = larger(norms, shared[i]);
  packed.norms[tile * 3] = norms.whole;
  packed.norms[tile * 3 + 1] = norms.low;
  packed.norms[tile * 3 + 2] = norms.rest;
}

// The codebook's largest norms, by every warp for itself.
__device__ inline SplitNorms codebook_norms(const Packed& packed) {
  SquaredNorms norms{};
  for (int tile = threadIdx.x % 32; tile < packed.count; tile += 32)
    norms = larger(norms, {packed.norms[tile * 3], packed.norms[tile * 3 + 1], packed.norms[tile * 3 + 2]});
  norms = largest_of_warp(norms);
  return split_norms(norms.whole, norms.low, norms.rest);
}

// 2 (p + f) of a row. A tensor core's step adds 16 products and the accumulator, cut off below 2^-23 of the largest of
// them (Fasi et al., "Numerical behavior of NVIDIA tensor cores", 2021); generations that take two halves add two more.
template <int kSteps>
__device__ inline double row_slack(const Problem& p, int terms, const SplitNorms& z, const SplitNorms& e) {
  const double z2 = z.whole * z.whole, e2 = e.whole * e.whole;
  const double sum_error = 1.04 * 2 * kUnitRoundoff * 20 * kSteps * (z.whole * e.whole + e2 / 2);
  return proposal_slack(p.d, !p.inner_product, split_error(terms, z, e) + sum_error, z2, e2) +
         Shape<kSteps>::slots * 0x1p-123;
}

// Loads z's operands of a warp and, per lane, the bound of row `lane`. staging: [16][slots] of the warp's own.
template <int kSteps>
__device__ inline double load_rows(const Problem& p, const Packed& packed, std::int64_t first, bfloat16* staging,
                                   std::uint32_t (&z)[kFragments][kSteps][4]) {
  const int lane = threadIdx.x % 32;
  const SplitNorms code_norms = codebook_norms(packed);
  double slack = 0.0;
#pragma unroll
  for (int m = 0; m < kFragments; ++m) {
    const SquaredNorms found = pack_vectors<kSteps, true>(p, packed.terms, first + m * 16, staging);
    const SplitNorms norms = split_norms(found.whole, found.low, found.rest);
    const double bound = row_slack<kSteps>(p, packed.terms, norms, code_norms);
    if (lane / 16 == m) slack = bound;
    __syncwarp();
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      load_matrix_x4(z[m][step], staging + unit_place<kSteps>(lane % 16, 2 * step + lane / 16) * 8);
    __syncwarp();
  }
  return slack;
}

// What a thread keeps of a row: its class's largest maxima, in descending order, and the largest of the others.
template <int kKept>
struct Maxima {
  float best[kKept], rest;
  int tile[kKept];

  __device__ Maxima() : rest(-bits_float(0x7f800000)) {
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      best[i] = rest;
      tile[i] = 0;
    }
  }

  __device__ void insert(float top, int of_tile) {
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const bool above = top > best[i];
      const float lesser = above ? best[i] : top;
      const int lesser_tile = above ? tile[i] : of_tile;
      best[i] = above ? top : best[i];
      tile[i] = above ? of_tile : tile[i];
      top = lesser;
      of_tile = lesser_tile;
    }
    rest = fmaxf(rest, top);
  }
};

// Of rows lane / 4 and lane / 4 + 8 of each operand.
template <int kSteps>
using AllMaxima = Maxima<Shape<kSteps>::kept>[kFragments][2];

template <int kSteps>
__device__ inline void stage_tile(const Packed& packed, int tile, bfloat16* to) {
  const bfloat16* from = packed.tiles + static_cast<std::int64_t>(tile) * Shape<kSteps>::tile_values;
  for (int i = threadIdx.x; i < Shape<kSteps>::tile_values / 8; i += kThreads) copy_async<16>(to + i * 8, from + i * 8);
}

// Scores a tile and updates the maxima.
template <int kSteps>
__device__ inline void score_tile(const bfloat16* codes, int tile, const std::uint32_t (&z)[kFragments][kSteps][4],
                                  AllMaxima<kSteps>& maxima) {
  const int lane = threadIdx.x % 32;
  float top[kFragments][2];
#pragma unroll
  for (int m = 0; m < kFragments; ++m) top[m][0] = top[m][1] = -bits_float(0x7f800000);
#pragma unroll(kSteps == 2 ? 4 : 2)
  for (int group = 0; group < Shape<kSteps>::codes / 8; ++group) {
    float scores[kFragments][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; step += 2) {
      std::uint32_t e[4];
      load_matrix_x4(e, codes + unit_place<kSteps>(group * 8 + lane % 8, 2 * step + lane / 8) * 8);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const std::uint32_t operand[2] = {e[2 * half], e[2 * half + 1]};
#pragma unroll
        for (int m = 0; m < kFragments; ++m) mma_bf16(scores[m], z[m][step + half], operand);
      }
    }
#pragma unroll
    for (int m = 0; m < kFragments; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) top[m][i / 2] = fmaxf(top[m][i / 2], scores[m][i]);
  }
#pragma unroll
  for (int m = 0; m < kFragments; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) maxima[m][r].insert(top[m][r], tile);
}

__device__ inline float chain_product(const float* z, const float* e, int d) {
  float dot = __fmul_rn(z[0], e[0]);
  for (int i = 1; i < d; ++i) dot = __fmaf_rn(z[i], e[i], dot);
  return dot;
}

__device__ inline Candidate best_of_warp(Candidate mine) {
  for (int distance = 16; distance > 0; distance /= 2) {
    const Candidate other{__shfl_xor_sync(kAllLanes, mine.score, distance),
                          __shfl_xor_sync(kAllLanes, mine.code, distance)};
    if (better(other, mine)) mine = other;
  }
  return mine;
}

// The official code of a row among the codes of its open pairs. tiles[i * 4 + c]: a tile that is open for class c, or
// -1. One warp.
template <int kSteps>
__device__ inline int decide(const Problem& p, std::int64_t row, const int (&tiles)[4 * Shape<kSteps>::kept]) {
  constexpr int kPairs = 4 * Shape<kSteps>::kept;
  const int lane = threadIdx.x % 32;
  const float z_norm = p.inner_product ? 0.0f : p.z2[row];
  Candidate found[kPairs], best{-bits_float(0x7f800000), kNone};
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int in_tile = lane / 2 * 8 + i % 4 * 2 + lane % 2, code = tiles[i] * Shape<kSteps>::codes + in_tile;
    found[i] = {-bits_float(0x7f800000), kNone};
    if (tiles[i] < 0 || in_tile >= Shape<kSteps>::codes || code >= p.k) continue;
    const float dot = chain_product(p.z + row * p.d, p.codebook + static_cast<std::int64_t>(code) * p.d, p.d);
    found[i] = {official_score(p, z_norm, p.inner_product ? 0.0f : p.e2[code], dot), code};
    if (better(found[i], best)) best = found[i];
  }
  best = best_of_warp(best);
  if (!p.inner_product) return best.code;
  int lowest = best.code;
#pragma unroll
  for (int i = 0; i < kPairs; ++i)
    if (found[i].code < lowest && __fsub_rn(best.score, found[i].score) <= kTie) lowest = found[i].code;
  return __reduce_min_sync(kAllLanes, lowest);
}

// The row that slot (m, r) of the warp's quad `quad` stands for.
__device__ inline int warp_row(int m, int r, int quad) { return m * 16 + r * 8 + quad; }

template <int kSteps>
__device__ inline void decide_rows(const Problem& p, const Open& open, std::int64_t first, double slack,
                                   const AllMaxima<kSteps>& maxima) {
  constexpr int kKept = Shape<kSteps>::kept;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < kFragments; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Maxima<kKept>& mine = maxima[m][r];
      float top = mine.best[0];
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
      const double bound = __shfl_sync(kAllLanes, slack, warp_row(m, r, lane / 4));
      const float threshold = candidate_threshold(top, bound);
      const bool sound = is_finite(top) && bound <= kLargestBound;
      const unsigned is_unclear = __ballot_sync(kAllLanes, !sound || mine.rest >= threshold);
      unsigned is_open[kKept];
#pragma unroll
      for (int i = 0; i < kKept; ++i) is_open[i] = __ballot_sync(kAllLanes, mine.best[i] >= threshold);
      for (int quad = 0; quad < 8; ++quad) {
        const std::int64_t row = first + warp_row(m, r, quad);
        if (row >= p.n) break;
        if ((is_unclear >> (4 * quad) & 15u) != 0) {
          if (lane == 0) open.rows[atomicAdd(open.count, 1)] = row;
          continue;
        }
        int tiles[4 * kKept];
#pragma unroll
        for (int i = 0; i < 4 * kKept; ++i) {
          const int source = 4 * quad + i % 4;
          tiles[i] = -1;
          if ((is_open[i / 4] >> source & 1u) != 0) tiles[i] = __shfl_sync(kAllLanes, mine.tile[i / 4], source);
        }
        const int code = decide<kSteps>(p, row, tiles);
        if (lane == 0) p.indices[row] = code;
        for (int i = lane; i < p.d; i += 32)
          p.quantized[row * p.d + i] = p.codebook[static_cast<std::int64_t>(code) * p.d + i];
      }
    }
}

template <int kSteps>
__global__ void __launch_bounds__(kThreads) propose_kernel(Problem p, Packed packed, Open open) {
  using At = Shape<kSteps>;
  bfloat16* memory = dynamic_shared<bfloat16>();
  const int warp = threadIdx.x / 32;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kBlockRows + warp * kWarpRows;

  // Phase 1: this warp's rows, into registers. Warps past the last row only help to stage.
  const bool has_rows = first < p.n;
  std::uint32_t z[kFragments][kSteps][4] = {};
  double slack = 0.0;
  if (has_rows) slack = load_rows<kSteps>(p, packed, first, memory + warp * 16 * At::slots, z);
  __syncthreads();  // the codes take the memory over

  // Phase 2: all codes.
  const auto stage = [&](int tile) { return memory + tile % At::stages * At::tile_values; };
  for (int tile = 0; tile < At::stages - 1; ++tile) {
    if (tile < packed.count) stage_tile<kSteps>(packed, tile, stage(tile));
    copy_async_commit();
  }
  AllMaxima<kSteps> maxima;
  for (int tile = 0; tile < packed.count; ++tile) {
    copy_async_wait<At::stages - 2>();
    __syncthreads();  // the tile has landed for all, and all have left the one before it
    const int next = tile + At::stages - 1;
    if (next < packed.count) stage_tile<kSteps>(packed, next, stage(next));
    copy_async_commit();
    if (has_rows) score_tile<kSteps>(stage(tile), tile, z, maxima);
  }
  copy_async_wait<0>();

  // Phase 3: the official choice among what is left open.
  if (has_rows) decide_rows<kSteps>(p, open, first, slack, maxima);
}

}  // namespace gear::cuda::codebook::tensor
