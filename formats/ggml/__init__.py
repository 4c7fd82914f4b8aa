"""The GGUF file and the block types of ggml, read and written by numpy alone."""
