"""The `redqueen` command. Thin: it reads options, calls the house, prints."""
