"""The compiled module (csrc/bindings/cuda.cpp). Importing it registers the CUDA kernels."""

architectures: str  # compute capabilities, such as "8.0;9.0"
toolkit: str  # its version, such as "13.0"
