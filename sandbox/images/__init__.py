"""Images: what a sandbox's files come from, as people declare it, and how that is built once and kept."""
