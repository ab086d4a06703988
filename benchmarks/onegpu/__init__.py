"""What ``one_gpu.py`` is made of: where stages run, the links between them, one run, and what is read off it."""
