"""`python -m pbsfs`."""

from pbsfs.cli import main

if __name__ == "__main__":
    main()
