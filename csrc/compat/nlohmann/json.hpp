// torch's headers of vmap include this header, and torch does not ship it. Declarations that
// satisfy inline functions nobody here calls; an installed nlohmann/json comes first (-idirafter).
#pragma once

#include <string>

namespace nlohmann {

struct json {
  json() = default;
  template <class T>
  explicit json(const T&);
  template <class T>
  json& operator=(const T&);
  json& operator[](const char*);
  const json& operator[](const char*) const;
  std::string dump() const;
  static json parse(const std::string&);
  template <class T>
  T get() const;
};

}  // namespace nlohmann
