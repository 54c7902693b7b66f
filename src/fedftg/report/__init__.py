"""Tables and plots of runs: reads run folders and nothing else."""
