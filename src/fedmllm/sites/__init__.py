"""Training across sites: keys, and the processes that run at the server and at each site."""
