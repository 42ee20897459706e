"""C++ and CUDA sources of the dual-stream product, shipped with the package as `libortho.kernels`."""
