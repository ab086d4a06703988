"""Code that runs on the device: Triton functions and nothing else. The wrappers beside this folder check and launch."""
