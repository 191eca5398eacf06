"""See `evidence.evaluation_cost`."""

from evidence.evaluation_cost import main

if __name__ == "__main__":
    main()
