"""Linear layers with narrow weights for NVIDIA GPUs, by kernels in Triton."""
