"""What the sandbox's first process does: serve the guest protocol, start processes, reap everything.

It is single-threaded around one epoll loop and built on the interpreter's C modules, because the
Python layers above them (`socket`, `selectors`, `signal`, `json`) cost more time and memory than the
whole of the rest, and there is one of these processes per sandbox. For the same reason nothing is imported for
annotations alone.
"""
