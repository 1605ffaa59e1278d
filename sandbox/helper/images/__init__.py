"""Images of kernels as files: what is in them, how their memory is mapped instead of copied. No process, no privilege."""
