"""Training across sites: keys, settings, and the processes that run at the server and at each site."""
