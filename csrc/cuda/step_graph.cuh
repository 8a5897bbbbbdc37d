// A CUDA graph of a step: kernels that are captured once, and then started together by one call as often as wanted.
#pragma once

#include <exception>
#include <utility>
#include <variant>
#include <vector>

#include "../api/backend.h"
#include "device/device.cuh"

namespace mnist_ext::cuda {

// While this lives, the thread may create what a capture needs although another thread is capturing, and that one's
// capture goes on.
class BesideOtherCaptures {
 public:
  BesideOtherCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~BesideOtherCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  BesideOtherCaptures(const BesideOtherCaptures&) = delete;
  BesideOtherCaptures& operator=(const BesideOtherCaptures&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // then the one before
};

// Whether what is started on the stream goes into somebody's capture instead of running.
inline bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &status) == cudaSuccess) return status != cudaStreamCaptureStatusNone;
  cudaGetLastError();  // of the default stream while another one is captured: the next launch says so
  return true;
}

// Of a whole batch; serves for further calls too. Whatever its kernels do not find in device memory when they run is in
// `holds`, and a call for which that is something else does not use it.
class CapturedStep : public StepGraph {
 public:
  // A program, with the address of its workspace.
  template <class T>
  using Fixed = std::pair<std::vector<Entry<T>>, void*>;
  using Known = std::variant<std::monostate, Fixed<float>, Fixed<double>>;

  Known holds;           // monostate: there is no graph
  Known started;         // the same of the last step that was made without it
  bool refused = false;  // by the driver, once

  CapturedStep() = default;
  ~CapturedStep() override { reset(); }  // does not wait for what is running
  CapturedStep(const CapturedStep&) = delete;
  CapturedStep& operator=(const CapturedStep&) = delete;

  // Holds what start(stream) starts from now on, in place of what it held; nothing of it runs. Where the driver
  // refuses, or start throws, it holds nothing and is refused. Waits for nothing.
  template <class Start>
  void capture(const Known& fixed, const Start& start) {
    reset();
    refused = !capture(start);
    if (!refused) holds = fixed;
  }

  void launch(cudaStream_t stream) const { check(cudaGraphLaunch(executable_, stream), "cudaGraphLaunch"); }

 private:
  void reset() {
    if (executable_) cudaGraphExecDestroy(executable_);
    executable_ = nullptr;
    holds = {};
  }

  template <class Start>
  bool capture(const Start& start) {
    const BesideOtherCaptures beside;
    // Not on the caller's stream, which may be the default one, that cannot be captured.
    cudaStream_t stream = nullptr;
    cudaGraph_t graph = nullptr;
    bool done = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess &&
                cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed) == cudaSuccess;
    if (done) {
      done = starts(start, stream);
      done = cudaStreamEndCapture(stream, &graph) == cudaSuccess && done;  // ends it in any case
    }
    done = done && cudaGraphInstantiate(&executable_, graph, 0) == cudaSuccess;
    if (!done) cudaGetLastError();  // or the next one to ask would take it for his own
    if (graph) cudaGraphDestroy(graph);
    if (stream) cudaStreamDestroy(stream);
    return done;
  }

  template <class Start>
  static bool starts(const Start& start, cudaStream_t stream) {
    try {
      start(stream);
      return true;
    } catch (const std::exception&) {  // the caller starts the same without a graph, and meets it again
      return false;
    }
  }

  cudaGraphExec_t executable_ = nullptr;
};

}  // namespace mnist_ext::cuda
