// The CUDA kernels of whole training steps, as ordinary C++ on the emulator.
#include "../../csrc/kernels/cuda/graph.cu"
#include "../../csrc/kernels/cuda/train_step_sequence.cu"
