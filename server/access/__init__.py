"""Who may do what here: keys, roles, the route table, limits, and the tasks as one caller sees them."""
