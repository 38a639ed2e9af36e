"""Floor 2: the HTTP server over the runtime: an API for clients, tenants and operators, and the `peqa` command."""
