"""The command line: one file a group of commands; the terminal, the demonstration, conversations and plots."""
