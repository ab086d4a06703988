"""Transports between GPUs: NCCL and CUDA IPC."""
