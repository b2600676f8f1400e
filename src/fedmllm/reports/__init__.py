"""What is read: pages, figures and tables of runs and sweeps, and what there is to choose from."""
