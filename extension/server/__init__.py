"""The Jupyter server extension: authenticates, authorises, forwards to the keeper, re-attaches kernels."""
