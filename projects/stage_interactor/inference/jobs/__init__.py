"""Any number of pictures in parts: by processes or a Ray cluster, and again after a kill."""
