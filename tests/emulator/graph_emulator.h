// Streams that can be captured and CUDA graphs, on the emulator. A stream that is not captured runs everything at once.
// As on the device, the default stream (null) cannot be captured, a launch's arguments are those at the capture, and a
// graph runs as often as it is launched.
#pragma once

#include <functional>
#include <memory>
#include <utility>
#include <vector>

enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal,
  cudaStreamCaptureModeThreadLocal,
  cudaStreamCaptureModeRelaxed
};
inline constexpr unsigned cudaStreamNonBlocking = 1;

struct CUgraph_st {
  std::vector<std::function<void()>> work;
};
struct CUgraphExec_st {
  std::vector<std::function<void()>> work;
};
struct CUstream_st {
  std::unique_ptr<CUgraph_st> capture;
};
using cudaStream_t = CUstream_st*;
using cudaGraph_t = CUgraph_st*;
using cudaGraphExec_t = CUgraphExec_st*;

namespace emulator {

inline cudaStream_t current_stream = nullptr;  // what null stands for, as ops of the CPU pass no stream
inline int graph_launches = 0;                 // so far
inline bool graphs_are_refused = false;        // by the driver that is played
inline bool captured_launches_fail = false;    // there

inline bool is_captured(cudaStream_t stream) {
  if (!stream) stream = current_stream;
  return stream && stream->capture;
}

inline void start(cudaStream_t stream, std::function<void()> work) {
  if (!stream) stream = current_stream;
  if (is_captured(stream)) {
    stream->capture->work.push_back(std::move(work));
  } else {
    work();
  }
}

}  // namespace emulator

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new CUstream_st;
  return cudaSuccess;
}

inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}

inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }

inline cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = emulator::is_captured(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (!stream) return cudaErrorStreamCaptureUnsupported;
  stream->capture = std::make_unique<CUgraph_st>();
  return cudaSuccess;
}

inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = stream->capture.release();
  return cudaSuccess;
}

inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  if (emulator::graphs_are_refused) return cudaErrorMemoryAllocation;
  *executable = new CUgraphExec_st{graph->work};
  return cudaSuccess;
}

inline cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  ++emulator::graph_launches;
  for (const auto& work : executable->work) emulator::start(stream, work);
  return cudaSuccess;
}

inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete executable;
  return cudaSuccess;
}
