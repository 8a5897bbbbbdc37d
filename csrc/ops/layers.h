// How an op is told of several linear layers: a number for each.
#pragma once

#include <cstdint>

namespace mnist_ext::ops {

enum LayerFlags : int64_t { kBias = 1, kRelu = 2 };

}  // namespace mnist_ext::ops
