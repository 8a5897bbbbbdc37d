// How an op is told of several linear layers: their parameters in one list, the weight of each followed by its bias
// where it has one, and a number for each layer.
#pragma once

#include <cstdint>

namespace mnist_ext::ops {

enum LayerFlags : int64_t { kBias = 1, kRelu = 2 };

}  // namespace mnist_ext::ops
