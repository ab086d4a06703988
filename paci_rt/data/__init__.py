"""Token data: from documents to files of tokens, and back as arrays; no torch."""
