"""What this machine can do, and what training and kernels do on it, ours and PyTorch's."""
