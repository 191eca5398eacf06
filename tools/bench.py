"""See `evidence.bench`."""

from evidence.bench import main

if __name__ == "__main__":
    main()
