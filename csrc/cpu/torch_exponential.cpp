// A number is float(-log1p(-x)), x = (53 low bits of two words) / 2^53, its logarithm in double. 1 - x is exact, so
// this is -log(1 - x): computed here for many at a time to within a few units of the last place, which decides the
// float but for one number in some ten millions. Those are left to the C library's log1p, which torch calls for all.
//
// Words come from a recurrence and are made by one thread, a piece ahead of the logarithms, which all threads share.
#include "cpu/torch_exponential.h"

#include <cmath>
#include <cstring>

#include "cpu/parallel.h"
#include "cpu/skinny_linear.h"

namespace gear::GEAR_ISA {
namespace {

constexpr std::int64_t kPiece = 4096;  // numbers
constexpr int kBlock = 64;             // numbers whose logarithms are taken together
constexpr std::int64_t kTask = 1024;   // numbers

class MersenneTwister {
 public:
  explicit MersenneTwister(const TorchGenerator& from) : left_(from.left), next_(static_cast<int>(from.next)) {
    for (int i = 0; i < kMersenneWords; ++i) state_[i] = static_cast<std::uint32_t>(from.words[i]);
  }

  void save(TorchGenerator& to) const {
    to.left = left_;
    to.next = static_cast<std::uint64_t>(next_);
    for (int i = 0; i < kMersenneWords; ++i) to.words[i] = state_[i];
  }

  void fill(std::uint32_t* words, std::int64_t n) {
    while (n > 0) {
      if (left_ == 1) twist();
      const int count = static_cast<int>(n < left_ - 1 ? n : left_ - 1);
      temper(state_ + next_, count, words);
      next_ += count;
      left_ -= count;
      words += count;
      n -= count;
    }
  }

 private:
  static constexpr int kShift = 397;

  static std::uint32_t mixed(std::uint32_t high, std::uint32_t low) {
    const std::uint32_t joined = (high & 0x80000000u) | (low & 0x7fffffffu);
    return (joined >> 1) ^ ((0u - (low & 1u)) & 0x9908b0dfu);
  }

  void twist() {
    constexpr int kHead = kMersenneWords - kShift;
    for (int i = 0; i < kHead; ++i) state_[i] = state_[i + kShift] ^ mixed(state_[i], state_[i + 1]);
    for (int i = kHead; i < kMersenneWords - 1; ++i) state_[i] = state_[i - kHead] ^ mixed(state_[i], state_[i + 1]);
    state_[kMersenneWords - 1] = state_[kShift - 1] ^ mixed(state_[kMersenneWords - 1], state_[0]);
    left_ = kMersenneWords + 1;
    next_ = 0;
  }

  static void temper(const std::uint32_t* from, int n, std::uint32_t* words) {
    for (int i = 0; i < n; ++i) {
      std::uint32_t y = from[i];
      y ^= y >> 11;
      y ^= (y << 7) & 0x9d2c5680u;
      y ^= (y << 15) & 0xefc60000u;
      words[i] = y ^ (y >> 18);
    }
  }

  std::uint32_t state_[kMersenneWords];
  int left_, next_;
};

std::uint64_t bits_of(double x) {
  std::uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

double of_bits(std::uint64_t bits) {
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// x of a number's two words, the high one first. Integers of 32 bits with a sign are what all instruction sets convert.
double uniform(std::uint32_t high, std::uint32_t low) {
  const auto top = static_cast<std::int32_t>(high & 0x1fffffu);
  const auto rest = static_cast<std::int32_t>(low ^ 0x80000000u);
  return static_cast<double>(top) * 0x1p-21 + (static_cast<double>(rest) + 0x1p31) * 0x1p-53;
}

// -log(u) for u in [2^-53, 1]: u = 2^k m with m around 1, log m = f - (f^2 / 2 - s (f^2 / 2 + R(s^2))) where f = m - 1
// and s = f / (2 + f), R the minimax polynomial of FreeBSD's e_log.c, ln 2 in two parts.
double minus_log(double u) {
  constexpr std::uint64_t kHalfRoot = 0x3fe6a09e00000000u, kOne = 0x3ff0000000000000u;  // sqrt(1/2), 1
  const std::uint64_t shifted = bits_of(u) + (kOne - kHalfRoot);
  const double k = of_bits((shifted >> 52) | 0x4330000000000000u) - (0x1p52 + 1023.0);
  const double m = of_bits(bits_of(u) - (shifted & 0xfff0000000000000u) + kOne);
  const double f = m - 1.0;
  const double s = f / (2.0 + f), z = s * s, w = z * z;
  const double odd =
      z * (6.666666666666735130e-01 +
           w * (2.857142874366239149e-01 + w * (1.818357216161805012e-01 + w * 1.479819860511658591e-01)));
  const double even = w * (3.999999999940941908e-01 + w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01));
  const double half = 0.5 * f * f;
  const double log =
      s * (half + (odd + even)) + k * 1.90821492927058770002e-10 - half + f + k * 6.93147180369123816490e-01;
  return 0.0 - log;
}

void block(const std::uint32_t* words, float* out) {
  alignas(64) double x[kBlock];
  alignas(64) float below[kBlock], above[kBlock];
  for (int i = 0; i < kBlock; ++i) x[i] = uniform(words[2 * i], words[2 * i + 1]);
  for (int i = 0; i < kBlock; ++i) {
    const double y = minus_log(1.0 - x[i]);
    below[i] = static_cast<float>(y * (1.0 - 0x1p-49));
    above[i] = static_cast<float>(y * (1.0 + 0x1p-49));
  }
  int open = 0;
  for (int i = 0; i < kBlock; ++i) {
    out[i] = below[i];
    open |= below[i] != above[i] ? 1 : 0;
  }
  if (open == 0) return;
  for (int i = 0; i < kBlock; ++i)
    if (below[i] != above[i]) out[i] = static_cast<float>(-std::log1p(-x[i]));
}

void numbers(const std::uint32_t* words, std::int64_t n, float* out) {
  std::int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) block(words + 2 * i, out + i);
  if (i == n) return;
  std::uint32_t padded[2 * kBlock] = {};
  float rest[kBlock];
  std::memcpy(padded, words + 2 * i, static_cast<std::size_t>(n - i) * 2 * sizeof *words);
  block(padded, rest);
  std::memcpy(out + i, rest, static_cast<std::size_t>(n - i) * sizeof *out);
}

}  // namespace

void torch_exponential(TorchGenerator& generator, std::int64_t n, float* out) {
  MersenneTwister twister(generator);
  auto* memory = static_cast<std::uint32_t*>(scratch(Scratch::sampler, 2 * 2 * kPiece * sizeof(std::uint32_t)));
  const auto size_at = [n](std::int64_t first) { return n - first < kPiece ? n - first : kPiece; };
  twister.fill(memory, 2 * size_at(0));
  for (std::int64_t first = 0, piece = 0; first < n; first += kPiece, ++piece) {
    const std::uint32_t* words = memory + piece % 2 * 2 * kPiece;
    std::uint32_t* ahead = memory + (piece + 1) % 2 * 2 * kPiece;
    const std::int64_t size = size_at(first), left = n - first - size;
    parallel_for(1 + (size + kTask - 1) / kTask, [&](std::int64_t task) {
      if (task == 0) {
        if (left > 0) twister.fill(ahead, 2 * size_at(first + size));
        return;
      }
      const std::int64_t at = (task - 1) * kTask, count = size - at < kTask ? size - at : kTask;
      numbers(words + 2 * at, count, out + first + at);
    });
  }
  twister.save(generator);
}

}  // namespace gear::GEAR_ISA
