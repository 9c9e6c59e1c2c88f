"""The rate that a large matrix product reached: no kernel's products go faster, on the device it was measured on."""

MATMUL_TFLOPS, MATMUL_DEVICE = 778.0, "NVIDIA H200"
