"""`python -m daemon` is `image-jobs`."""

from daemon.cli import main

if __name__ == "__main__":
    main()
