// A program as launches, one entry after the other on the stream, which alone keeps them in order: entries share their
// workspace. Nothing waits for the device.
//
// A parameter is updated by a kernel of its own, from a gradient in memory: one launch for all whose options are the
// same, behind the last of the products that form the gradients.
#pragma once

#include <algorithm>
#include <vector>

#include "cross_entropy/launch.cuh"
#include "gather.cuh"
#include "product/plan.cuh"
#include "sgd.cuh"

namespace mnist_ext::cuda {

// Gradients that have been formed, and not been applied yet.
template <class T>
class PendingUpdates {
 public:
  void add(const Product<T>& product) {
    add(product.update, product.M * product.N, product.c);
    add(product.row_sums_update, product.M, product.row_sums);
  }

  void apply(cudaStream_t stream) {
    for (const Alike& alike : pending_) {
      sgd_step(alike.tensors.data(), static_cast<int64_t>(alike.tensors.size()), alike.options, alike.lr, stream);
    }
    pending_.clear();
  }

 private:
  struct Alike {
    SgdOptions options;
    const double* lr;
    std::vector<SgdTensor<T>> tensors;
  };

  void add(const ParameterUpdate<T>& update, int64_t size, const T* gradient) {
    if (!update.param) return;
    const auto is_alike = [&](const Alike& alike) { return alike.options == update.options && alike.lr == update.lr; };
    auto alike = std::find_if(pending_.begin(), pending_.end(), is_alike);
    if (alike == pending_.end()) alike = pending_.insert(alike, {update.options, update.lr, {}});
    alike->tensors.push_back({size, update.param, gradient, update.momentum_buffer});
  }

  std::vector<Alike> pending_;
};

template <class T>
void run(const Program<T>& program, void* workspace, cudaStream_t stream) {
  PendingUpdates<T> updates;
  for (const Entry<T>* entry = program.entries; entry != program.entries + program.count; ++entry) {
    const auto* product = std::get_if<Product<T>>(&entry->work);
    // Whatever is no such product may read the parameters.
    if (!product || !(product->update.param || product->row_sums_update.param)) updates.apply(stream);
    if (product) {
      start_product(*product, workspace, stream);
      updates.add(*product);
    } else if (const auto* loss = std::get_if<CrossEntropyForward<T>>(&entry->work)) {
      cross_entropy_forward(*loss, workspace, stream);
    } else if constexpr (sizeof(T) >= sizeof(float)) {  // there are no steps in half dtypes
      gather(std::get<Gather<T>>(entry->work), stream);
    }
  }
  updates.apply(stream);
}

template <class T>
int64_t workspace_bytes(const Program<T>& program) {
  int64_t most = 0;
  for (const Entry<T>* entry = program.entries; entry != program.entries + program.count; ++entry) {
    if (const auto* product = std::get_if<Product<T>>(&entry->work)) {
      most = std::max(most, product_workspace_bytes(*product));
    } else if (const auto* loss = std::get_if<CrossEntropyForward<T>>(&entry->work)) {
      most = std::max(most, cross_entropy_workspace_bytes(*loss));
    }
  }
  return most;
}

}  // namespace mnist_ext::cuda
