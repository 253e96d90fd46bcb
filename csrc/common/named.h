// SPDX-License-Identifier: Apache-2.0
// The operators take options by name; tables of these say which value a name has.
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

// Returns the value under a name. The public functions have checked the name, so only a call of an
// operator past them can fail here.
template <typename E, size_t kCount>
E by_name(const Named<E> (&options)[kCount], std::string_view name) {
  for (const Named<E>& option : options) {
    if (option.name == name) return option.value;
  }
  throw std::invalid_argument("no option is called '" + std::string(name) + "'");
}

}  // namespace kdk
