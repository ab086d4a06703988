"""Runs the stages of one process."""
