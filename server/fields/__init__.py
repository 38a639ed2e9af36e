"""What clients may send: fields, their types, and those of other servers."""
