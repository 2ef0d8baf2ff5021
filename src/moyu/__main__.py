"""`python -m moyu`: the `moyu` command."""

from moyu.commands.cli import main

if __name__ == "__main__":
    main("python -m moyu")
