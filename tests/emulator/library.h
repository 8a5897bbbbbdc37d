// What the library's files share.
#pragma once

#include <functional>

#define EXPORTED __attribute__((visibility("default")))

namespace emulated {

// What `call` throws, or null.
const char* error_of(const std::function<void()>& call);

}  // namespace emulated
