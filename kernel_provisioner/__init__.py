"""Jupyter kernels in sandboxes: the provisioner, the message proxy and the kernelspecs."""
