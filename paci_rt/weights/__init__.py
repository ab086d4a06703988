"""Which weights a forward and a backward see, one file a policy."""
