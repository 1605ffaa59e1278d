"""Images of kernels as files: what is in them, how their memory is mapped instead of copied. No process, no privilege.

For the helper: `lazy.edit`, `lazy.page_files`, `compact.compact`, `credentials.check`, `contents.describe`, and
`errors.ImageError`. See the head of each module.
"""
