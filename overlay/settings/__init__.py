"""What the operator said: flags, environment, files; and which store that names."""
