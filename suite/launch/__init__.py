"""Run the cells of a grid: which are missing, where their jobs run, and the status of each."""
