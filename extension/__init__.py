"""What people touch: the keeper, the Jupyter server extension, the IPython magics and the command line."""
