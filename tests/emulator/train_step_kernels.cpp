// The CUDA kernels of whole training steps, as ordinary C++ on the emulator, and a switch for them.
#include "../../csrc/kernels/cuda/graph.cu"
#include "../../csrc/kernels/cuda/train_step.cu"
#include "../../csrc/kernels/cuda/train_step_sequence.cu"

extern "C" void emulator_set_largest_cluster(unsigned blocks) { emulator::largest_cluster = blocks; }
