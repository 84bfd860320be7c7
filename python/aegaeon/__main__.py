"""`python -m aegaeon`."""

from aegaeon.cli import main

if __name__ == "__main__":
    main()
