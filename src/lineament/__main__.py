"""`python -m lineament` is the command `lineament`."""

from lineament.cli import main

if __name__ == "__main__":
    main()
