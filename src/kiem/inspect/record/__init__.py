"""Recording: operations, values, backward calls, and the lines they come from."""
