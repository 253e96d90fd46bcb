// SPDX-License-Identifier: Apache-2.0
// The instruction set is chosen at run time. CMake compiles each `*_simd.cpp` once per level, with
// KDK_SIMD_LEVEL naming the level's namespace. Such a file keeps all of its functions in that
// namespace and includes only functions that are inlined, so that no function compiled for a wide
// level can be linked into a narrow one.
//
// A product and a sum are rounded apart unless the file says otherwise, in a line that begins with
// "fp-contract: fast" and gives the reason. CMake reads that line.
#pragma once

#include <cstdint>
#include <type_traits>

namespace kdk {

enum class SimdLevel { kBaseline, kAvx2, kAvx512 };

// The widest level that was compiled, that this processor has, and that KDKERNELS_SIMD ("baseline",
// "avx2", "avx512") allows.
SimdLevel simd_level();

// An integer as wide as T: a loop that counts in it keeps its number of lanes.
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
