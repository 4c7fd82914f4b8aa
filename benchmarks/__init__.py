"""One script per claim of the README. Each runs the command line a user would and prints a table."""
