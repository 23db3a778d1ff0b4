"""One file a resource; a route parses, does one thing and returns."""
