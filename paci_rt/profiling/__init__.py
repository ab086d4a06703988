"""What blocks and links cost, measured."""
