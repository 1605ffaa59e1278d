"""The root process that dumps and restores kernels, and makes ordinary users' sandboxes. Standard library only."""
