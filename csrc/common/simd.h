// SPDX-License-Identifier: Apache-2.0
// Run-time choice of an instruction set. CMake compiles each `*_simd.cpp` once per level, with
// KDK_SIMD_LEVEL naming the namespace; those files keep everything else in it and include only what
// inlines, so that no function compiled for a wide level can be linked into a narrow one.
#pragma once

#include <cstdint>
#include <type_traits>

namespace kdk {

enum class SimdLevel { kBaseline, kAvx2, kAvx512 };

// The widest level that was compiled, that this processor has, and that KDKERNELS_SIMD ("baseline",
// "avx2", "avx512") allows.
SimdLevel simd_level();

// An integer as wide as T, so that a loop that counts keeps its number of lanes.
template <typename T>
using Count = std::conditional_t<sizeof(T) == sizeof(float), int32_t, int64_t>;

// Calls a function template of the level in use, e.g. KDK_SIMD_CALL(epilogues<float>)().
#if defined(KDK_SIMD_X86)
#define KDK_SIMD_DECLARE(...) \
  namespace baseline {        \
  __VA_ARGS__                 \
  }                           \
  namespace avx2 {            \
  __VA_ARGS__                 \
  }                           \
  namespace avx512 {          \
  __VA_ARGS__                 \
  }
#define KDK_SIMD_CALL(...)                                   \
  (simd_level() == SimdLevel::kAvx512 ? &avx512::__VA_ARGS__ \
   : simd_level() == SimdLevel::kAvx2 ? &avx2::__VA_ARGS__   \
                                      : &baseline::__VA_ARGS__)
#else
#define KDK_SIMD_DECLARE(...) \
  namespace baseline {        \
  __VA_ARGS__                 \
  }
#define KDK_SIMD_CALL(...) (&baseline::__VA_ARGS__)
#endif

}  // namespace kdk

extern "C" const char* kdkernels_simd_level();
