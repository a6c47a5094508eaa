"""`python -m pedyra`: the command line where no script is on the path."""

from pedyra.cli import main

if __name__ == "__main__":
    main()
