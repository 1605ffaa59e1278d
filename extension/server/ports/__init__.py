"""Web ports of sandboxes on URLs of a server: who may, what is passed on, and what is kept from both ends."""
