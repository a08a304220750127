"""The command line: flags in, one call into app, render, exit code. A command imports only what it uses."""
