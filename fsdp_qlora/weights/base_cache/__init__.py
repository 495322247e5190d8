"""Quantized bases kept on the disk: an entry for each checkpoint and codec, a file for each unit."""
