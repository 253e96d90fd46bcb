// SPDX-License-Identifier: Apache-2.0
// kdkernels._C: facts about the build, for people. Tensor operators are in the libraries, which
// know no Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "common/simd.h"

namespace {

std::map<std::string, std::string> build_info() {
  return {
      {"compiler", KDK_COMPILER},       {"build_type", KDK_BUILD_TYPE},
      {"torch", KDK_TORCH_VERSION},     {"torch_abi", KDK_TORCH_TARGET},
      {"simd_levels", KDK_SIMD_LEVELS}, {"cuda_architectures", KDK_CUDA_ARCHITECTURES},
  };
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "How the native libraries of kdkernels were built, and what they use here";
  m.def("build_info", &build_info,
        "Compiler, build type, torch, and the instruction sets that were compiled");
  m.def(
      "simd_level", [] { return std::string(kdkernels_simd_level()); },
      "Instruction set of the CPU kernels here");
}
