"""The engine: sandboxes, their templates and their GPUs. It knows nothing of Jupyter."""
