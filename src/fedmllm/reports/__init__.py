"""Reports: pages, figures and tables of runs and sweeps, and catalogs of datasets, methods and models."""
