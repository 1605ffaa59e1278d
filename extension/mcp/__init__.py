"""The MCP server: sandboxes as tools of a model. It is a client of the REST like any other."""
