"""The process: log, deferred imports, run directory, files."""
