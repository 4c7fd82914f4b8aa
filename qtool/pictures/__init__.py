"""What a file holds and what it costs, as pages that need nothing else: `inspect --report` and `plot`."""
