"""One verb a file: its flags, handed to the command of the same name, and the report shown."""
