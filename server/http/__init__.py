"""What every route shares: refusals, bodies, streams, lists, connections, the API's description."""
