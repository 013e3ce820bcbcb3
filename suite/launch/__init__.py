"""Running the cells of a grid: what is missing, where jobs run, how they stand."""
