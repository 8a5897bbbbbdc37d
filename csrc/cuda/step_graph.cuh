// Capturing and starting CUDA graphs.
#include <exception>

#include "device.cuh"
#include "graph.h"

namespace mnist_ext::cuda {
namespace {

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

bool starts(const std::function<void(cudaStream_t)>& start, cudaStream_t stream) {
  try {
    start(stream);
    return true;
  } catch (const std::exception&) {  // the caller starts the same without a graph, and meets it again
    return false;
  }
}

}  // namespace

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &status) == cudaSuccess) return status != cudaStreamCaptureStatusNone;
  cudaGetLastError();  // of the default stream while another one is captured: the next launch says so
  return true;
}

Graph::~Graph() { reset(); }

void Graph::reset() {
  if (executable_) cudaGraphExecDestroy(executable_);
  executable_ = nullptr;
}

bool Graph::capture(const std::function<void(cudaStream_t)>& start) {
  reset();
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

void Graph::launch(cudaStream_t stream) const { check(cudaGraphLaunch(executable_, stream), "cudaGraphLaunch"); }

}  // namespace mnist_ext::cuda
