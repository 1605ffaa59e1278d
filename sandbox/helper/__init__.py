"""The root process that dumps and restores kernels, and makes the sandboxes of ordinary users. Standard library only."""
