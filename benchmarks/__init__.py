"""Every speed and memory claim of the project, each a script with its result file."""
