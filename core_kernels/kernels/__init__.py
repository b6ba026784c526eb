"""The Triton kernels. Importing this package needs Triton; only ``core_kernels.triton_engine`` does."""
