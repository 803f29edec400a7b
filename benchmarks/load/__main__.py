"""`make bench-service`."""

if __name__ == "__main__":
    # Not above: processes of clients import this file, and need nothing of what measures.
    from benchmarks.load.measure import main

    main()
