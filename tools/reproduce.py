"""See `evidence.reproduce`."""

from evidence.reproduce import main

if __name__ == "__main__":
    main()
