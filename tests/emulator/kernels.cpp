// The CUDA kernels, as ordinary C++ on the emulator, and its switches.
#include "../../csrc/kernels/cuda/kernels_bfloat16.cu"
#include "../../csrc/kernels/cuda/kernels_float16.cu"
#include "../../csrc/kernels/cuda/kernels_float32.cu"
#include "../../csrc/kernels/cuda/kernels_float64.cu"

extern "C" {

void emulator_set_seed(unsigned seed) { emulator::seed = seed; }

void emulator_set_device(int compute_capability_major, int shared_bytes_of_block) {
  emulator::compute_capability_major = compute_capability_major;
  emulator::shared_bytes_of_block = shared_bytes_of_block;
}

int emulator_launches() { return emulator::launches; }
}
