"""The operating system: start a tree of processes and leave none behind."""
