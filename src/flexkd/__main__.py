"""`python -m flexkd` is the `flexkd` command."""

from flexkd.cli import main

if __name__ == "__main__":
    main()
