"""HTTP and the commands: the only package that imports the other two."""
