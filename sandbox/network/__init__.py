"""How a sandbox without a network reaches what it may: policies, and the proxy that holds them."""
