"""Jupyter's own REST and WebSockets of kernels, for clients that speak nothing else; each kernel is in a sandbox."""
