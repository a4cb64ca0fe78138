"""HTTP in, HTTP out: the corridor that knows the order of the steps."""
