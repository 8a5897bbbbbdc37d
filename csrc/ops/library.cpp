// Registers the ops; torch.ops.mnist_ext.* calls them.
#include <torch/csrc/stable/library.h>

#include "schemas.h"

STABLE_TORCH_LIBRARY(mnist_ext, m) { mnist_ext::ops::define_ops(m); }
