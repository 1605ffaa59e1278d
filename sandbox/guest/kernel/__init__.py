"""Kernels: how one comes up in a fresh interpreter, and the fork server that has one half up already."""
