"""See `evidence.matrix`."""

from evidence.matrix import main

if __name__ == "__main__":
    main()
