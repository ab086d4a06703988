"""What ``comm_overlap.py`` measures with: ways to move bytes, compute to hide them behind, tables and a plot."""
