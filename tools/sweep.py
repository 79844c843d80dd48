"""`jaxlm sweep`."""

if __name__ == "__main__":
    from jaxlm.__main__ import main

    main("sweep")
