// SPDX-License-Identifier: Apache-2.0
#include "simd.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace kdk {
namespace {

SimdLevel detect() {
  SimdLevel level = SimdLevel::kBaseline;
#if defined(KDK_SIMD_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) level = SimdLevel::kAvx2;
  if (level == SimdLevel::kAvx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl")) {
    level = SimdLevel::kAvx512;
  }
#endif
  if (const char* limit = std::getenv("KDKERNELS_SIMD")) {
    if (std::strcmp(limit, "baseline") == 0) level = SimdLevel::kBaseline;
    if (std::strcmp(limit, "avx2") == 0) level = std::min(level, SimdLevel::kAvx2);
  }
  return level;
}

}  // namespace

SimdLevel simd_level() {
  static const SimdLevel level = detect();
  return level;
}

}  // namespace kdk

extern "C" const char* kdkernels_simd_level() {
  switch (kdk::simd_level()) {
    case kdk::SimdLevel::kAvx512: return "avx512";
    case kdk::SimdLevel::kAvx2: return "avx2";
    default: return "baseline";
  }
}
