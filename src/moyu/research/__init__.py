"""Studies of the paper and the scoreboard: for the command line, not for the library."""
