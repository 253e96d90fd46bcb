// SPDX-License-Identifier: Apache-2.0
// The values of an option under the names that the operators take.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

namespace kdk {

template <typename E>
struct Named {
  std::string_view name;
  E value;
};

// The public functions have checked the name; who calls an operator past them gets an error.
template <typename E, size_t kCount>
E by_name(const Named<E> (&options)[kCount], std::string_view name) {
  for (const Named<E>& option : options) {
    if (option.name == name) return option.value;
  }
  throw std::invalid_argument("no option is called '" + std::string(name) + "'");
}

}  // namespace kdk
