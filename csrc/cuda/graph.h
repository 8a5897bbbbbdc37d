// A CUDA graph: kernels that are captured once, and then started together by one call as often as wanted.
#pragma once

#include <functional>

struct CUstream_st;  // a cudaStream_t points to one
struct CUgraphExec_st;

namespace mnist_ext::cuda {

// Whether what is started on the stream goes into somebody's capture instead of running.
bool is_capturing(CUstream_st* stream);

class Graph {
 public:
  Graph() = default;
  ~Graph();  // does not wait for what is running
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  // Holds what start(stream) starts from now on, in place of what it held; nothing of it runs. Returns false, holding
  // nothing, where the driver refuses, or start throws. Waits for nothing.
  bool capture(const std::function<void(CUstream_st*)>& start);

  void launch(CUstream_st* stream) const;

 private:
  void reset();

  CUgraphExec_st* executable_ = nullptr;
};

}  // namespace mnist_ext::cuda
