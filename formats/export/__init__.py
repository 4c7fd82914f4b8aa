"""From a `.qtm` file to the layouts that other engines read."""
