// SPDX-License-Identifier: Apache-2.0
// What the lanes of a warp do together: votes, and the tensor core's loads and products.
#include <bit>
#include <cstring>

#include "cuda_host.h"

namespace kdk::host {

void meet(const void* const*, void* const*) {}

void ballot(const void* const in[32], void* const out[32]) {
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane)
    bits |= static_cast<unsigned>(*static_cast<const int*>(in[lane]) != 0) << lane;
  for (int lane = 0; lane < 32; ++lane) *static_cast<unsigned*>(out[lane]) = bits;
}

namespace {

float bf16(uint32_t bits) { return std::bit_cast<float>(bits << 16); }
float fp16(uint32_t bits) {
  return static_cast<float>(std::bit_cast<_Float16>(static_cast<uint16_t>(bits)));
}
// The hardware reads the upper 19 bits.
float tf32(uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000u); }

// Registers hold kPerRegister consecutive k; with g = lane / 4 and t = lane % 4,
//   a[0], a[1]  rows g and g + 8 at k = t kPerRegister, a[2], a[3] the same 4 kPerRegister on
//   b[0], b[1]  column g, the same two k;   d  rows g, g, g + 8, g + 8, columns 2 t, 2 t + 1, ...
template <int kPerRegister, float (*value)(uint32_t)>
void mma(const void* const in[32]) {
  constexpr int kDepth = 8 * kPerRegister, kBits = 32 / kPerRegister;
  float a[16][kDepth], b[kDepth][8];
  const auto element = [](uint32_t word, int e) {
    return value(kPerRegister == 1 ? word : word >> (kBits * e) & 0xffff);
  };
  for (int lane = 0; lane < 32; ++lane) {
    const auto& f = *static_cast<const Fragments*>(in[lane]);
    const int g = lane / 4, k = lane % 4 * kPerRegister;
    for (int e = 0; e < kPerRegister; ++e) {
      for (int r = 0; r < 4; ++r)
        a[g + r % 2 * 8][k + r / 2 * 4 * kPerRegister + e] = element(f.a[r], e);
      for (int r = 0; r < 2; ++r) b[k + r * 4 * kPerRegister + e][g] = element(f.b[r], e);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& f = *static_cast<const Fragments*>(in[lane]);
    for (int r = 0; r < 4; ++r) {
      const int row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
      float sum = f.d[r];
      for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[k][column];
      f.d[r] = sum;
    }
  }
}

const uint16_t* row_of(const void* const in[32], int lane) {
  return static_cast<const uint16_t*>(in[lane]);
}

}  // namespace

void mma_bf16(const void* const in[32], void* const*) { mma<2, bf16>(in); }
void mma_fp16(const void* const in[32], void* const*) { mma<2, fp16>(in); }
void mma_tf32(const void* const in[32], void* const*) { mma<1, tf32>(in); }

void load_matrices(const void* const in[32], void* const out[32]) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int m = 0; m < 4; ++m)
      std::memcpy(static_cast<uint32_t*>(out[lane]) + m,
                  row_of(in, m * 8 + lane / 4) + lane % 4 * 2, 4);
  }
}

void load_matrices_transposed(const void* const in[32], void* const out[32]) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int m = 0; m < 4; ++m) {
      const int row = m * 8 + lane % 4 * 2, column = lane / 4;
      static_cast<uint32_t*>(out[lane])[m] =
          row_of(in, row)[column] | static_cast<uint32_t>(row_of(in, row + 1)[column]) << 16;
    }
  }
}

}  // namespace kdk::host
