"""Replays of training runs in one process: tasks, methods, studies and what is made of their loss curves."""
